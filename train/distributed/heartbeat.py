"""Notice a rank that died or hangs, and end all ranks with one line that names it.

    beat       each second a thread of each rank writes the rank's state to the store: a count,
               progress marks of the main thread, the last step, the place in the program
    died       each rank watches the next one: its process has ended
    hangs      the beats of the next rank stopped; or no rank has marked progress for the timeout.
               Then the rank with the fewest marks hangs, and the others wait for it
    verdict    the first rank that finds a cause writes it to the store and prints it. The other
               ranks read it with their next beat, and exit without a message

Collectives keep a long timeout. If a collective times out, it does not say which rank was late, and
it cannot tell a hung rank from a rank 0 that writes a checkpoint. Beats can, for gloo and for NCCL.

The timeout begins after the first step. Compilation never counts as a hang. A run with slow steps
gets three times the longest pause between its marks. The thread counts beats instead of seconds, so
that a job continues after all of its processes were suspended.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from ._beat import Beat, Process, is_compiling, place, place_of

RANK_LOST = 75
"""Exit status of ranks that stop because another rank died, hangs or failed (EX_TEMPFAIL)."""

# Seconds. Rank 0 may build a dataset before the first step, and write a checkpoint later.
_LONG_TIMEOUT = 1800
# Seconds in which all ranks raise an error that they agreed on.
_AGREEMENT = 3.0
# Beats after the timeout for which a rank must make no progress before the run is ended.
_CONFIRMATIONS = 4
# A pause is a hang only if it is longer than this multiple of the longest pause so far.
_PAUSES = 3


class Heartbeat:
    """The thread of one rank.

    Args:
        store: a connection to the store of the launch, for this object alone.
        rank: number of this rank.
        size: number of ranks.
        timeout: seconds without a beat or a mark, after the first step, until a rank counts as
            hung.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: float):
        self._store = store
        self._rank = rank
        self._size = size
        self._timeout = timeout
        self._interval = min(1.0, timeout / 10)
        self._process = Process.this()

        # The main thread writes these.
        self._marks = 0
        self._step: int | None = None
        self._num_patient = 0
        self._has_left = False
        self._has_lost_connection = False

        # Only the thread uses these. Pauses and silences are numbers of beats.
        self._count = 0
        self._seen_marks = 0
        self._pause = 0
        self._patient_pause = 0
        self._longest_pause = 0
        self._late_beats = 0
        self._beats: list[Beat | None] = [None] * size
        self._silence = [0] * size

        self._publish()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    # --- called by the main thread

    def mark(self, step: int | None = None) -> None:
        """Note progress, and the number of complete steps."""
        self._marks += 1
        if step is not None:
            self._step = step

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """Allow half an hour without progress, as rank 0 needs for a checkpoint or a sample."""
        self._num_patient += 1
        self.mark()
        try:
            yield
        finally:
            self.mark()
            self._num_patient -= 1

    def leave(self) -> None:
        """Stop the thread. The process may end, and no rank counts it as dead."""
        self._has_left = True
        self._stopped.set()
        self._thread.join()
        with contextlib.suppress(dist.DistError):
            self._publish()

    def all_ranks_raise(self) -> bool:
        """Return whether all ranks raise an error now. All ranks call it, if they do."""
        self._store.set(f"raised/{self._rank}", "")
        keys = [f"raised/{rank}" for rank in range(self._size)]
        end = time.monotonic() + _AGREEMENT
        while not (agreed := self._store.check(keys)) and time.monotonic() < end:
            time.sleep(0.02)
        return agreed

    def fail(self, error: BaseException, *, is_input: bool) -> None:
        """Tell the other ranks that this rank ends with an error, and print one line.

        Args:
            is_input: whether it is an error of the input. All ranks then have the status 2.
        Returns: if the error is the first of all ranks, and not of the input. Otherwise the
            process ends here.
        """
        if is_lost_connection(error):
            # The thread finds the rank that is the cause, and ends the process.
            self._has_lost_connection = True
            self._thread.join(2 * self._timeout + 10)
        text = " ".join(str(error).split())
        beat = replace(self._beat(), place=place_of(error))
        verdict = self._verdict(
            beat, f"failed: {text if is_input else f'{type(error).__name__}: {text}'}"
        )
        if is_input:
            verdict["status"] = 2
        first = self._decide(verdict)
        if is_input or first != verdict:
            self._end(first)

    # --- the thread

    def _run(self) -> None:
        try:
            while not self._stopped.wait(self._interval):
                self._round()
        except dist.DistError:
            if not self._stopped.is_set():
                self._end_without_store()

    def _round(self) -> None:
        """Publish a beat, and look after the other ranks."""
        self._count_pause()
        self._publish()
        if self._store.check(["verdict"]):
            self._end(json.loads(self._store.get("verdict")))
        self._watch_next_rank()
        self._watch_progress()

    def _count_pause(self) -> None:
        self._count += 1
        if self._marks != self._seen_marks:
            self._longest_pause = max(self._longest_pause, self._pause)
            self._seen_marks = self._marks
            self._pause = 0
            self._patient_pause = 0
        elif is_compiling():
            self._pause = 0
        elif self._num_patient:
            self._patient_pause += 1
        else:
            self._pause += 1

    def _is_late(self) -> bool:
        timeout = max(self._timeout / self._interval, _PAUSES * self._longest_pause)
        is_late = self._pause > timeout or self._patient_pause * self._interval > _LONG_TIMEOUT
        return is_late and self._step is not None

    def _beat(self) -> Beat:
        where, in_collective = place()
        return Beat(
            rank=self._rank,
            process=self._process,
            count=self._count,
            marks=self._marks,
            step=self._step,
            place=where,
            in_collective=in_collective,
            is_late=self._is_late(),
            has_left=self._has_left,
        )

    def _publish(self) -> None:
        self._store.set(f"beat/{self._rank}", json.dumps(asdict(self._beat())))

    def _listen(self, ranks: Sequence[int]) -> list[Beat]:
        """Read the beats of other ranks, and count how long each has been the same."""
        texts = self._store.multi_get([f"beat/{rank}" for rank in ranks])
        beats = [Beat.read(text) for text in texts]
        for rank, beat in zip(ranks, beats, strict=True):
            before = self._beats[rank]
            is_same = before is not None and before.count == beat.count
            self._silence[rank] = self._silence[rank] + 1 if is_same else 0
            self._beats[rank] = beat
        return beats

    def _watch_next_rank(self) -> None:
        rank = (self._rank + 1) % self._size
        beat = self._listen([rank])[0]
        timeout = _LONG_TIMEOUT if beat.step is None else self._timeout
        has_ended = beat.process.state(self._process) == "has ended"
        if has_ended:
            beat = self._listen([rank])[0]  # it may have left since the last beat
        if beat.has_left:
            is_lost = self._has_lost_connection
        else:
            is_lost = has_ended or self._silence[rank] * self._interval > timeout
        if is_lost:
            self._lose(beat)

    def _watch_progress(self) -> None:
        """If this rank makes no progress, find the rank for which it waits."""
        self._late_beats = self._late_beats + 1 if self._is_late() else 0
        if not self._late_beats:
            return
        beats = self._listen([rank for rank in range(self._size) if rank != self._rank])
        if self._late_beats < _CONFIRMATIONS:
            return
        for beat in beats:
            if self._silence[beat.rank] >= _CONFIRMATIONS and not beat.has_left:
                self._lose(beat)
        beats.append(self._beat())
        fewest = min(beat.marks for beat in beats)
        # A rank that is behind and not late does long work, such as writing a checkpoint.
        late = [beat for beat in beats if beat.marks == fewest and beat.is_late]
        if late:
            self._lose(min(late, key=lambda beat: (beat.in_collective, beat.rank)))

    # --- the end

    def _lose(self, beat: Beat) -> NoReturn:
        """End all ranks, because one of them died or hangs."""
        state = beat.process.state(self._process)
        if beat.has_left:
            what = "stopped before the other ranks"
        elif state == "has ended":
            what = "died"
        else:
            what = f"hangs: no progress for {self._timeout:g} s"
        process = f"process {beat.process.pid} on {beat.process.host} {state}"
        verdict = self._verdict(beat, f"{what} ({process.rstrip()})")
        # A rank that finds itself to blame prints the line and ends. Killed, it might not print.
        verdict["kills"] = not beat.has_left and beat.rank != self._rank
        self._end(self._decide(verdict))

    def _verdict(self, beat: Beat, what: str) -> dict:
        return {
            "line": f"tritium: rank {beat.rank} {what}; {beat.last_words()}",
            "status": RANK_LOST,
            "found_by": self._rank,
            "rank": beat.rank,
            "process": asdict(beat.process),
            "kills": False,
        }

    def _decide(self, verdict: dict) -> dict:
        """Write a verdict, and print it. Returns: the first verdict of all ranks."""
        text = json.dumps(verdict).encode()
        first = self._store.compare_set("verdict", "", text)
        if first == text:
            _print(verdict["line"])
            _report_to_torchrun(verdict["line"])
        return json.loads(first)

    def _end_without_store(self) -> NoReturn:
        """End this rank, because the store does not answer."""
        if is_hosted_by_torchrun():
            line = "tritium: lost the store of torchrun; its first node died, or the network failed"
        else:
            line = "tritium: rank 0, which hosts the store, died or hangs"
        beat = self._beats[0] if self._rank != 0 else None
        if beat is not None:
            line += f"; {beat.last_words()}"
        if self._rank == 1 or (self._rank and os.environ.get("LOCAL_RANK") == "0"):
            _print(line)
        self._exit(RANK_LOST)

    def _end(self, verdict: dict) -> NoReturn:
        """End the process. Kill the hung process too, if it is on this machine."""
        lost = Process(**verdict["process"])
        is_here = lost.state(self._process) in ("is running", "is stopped")
        if verdict["kills"] and verdict["rank"] != self._rank and is_here:
            # torchrun waits 30 s for a stopped process.
            with contextlib.suppress(ProcessLookupError):
                os.kill(lost.pid, signal.SIGKILL)
        if self._rank == 0 and not is_hosted_by_torchrun():
            time.sleep(3 * self._interval)  # the other ranks read the verdict from this process
        self._exit(verdict["status"])

    def _exit(self, status: int) -> NoReturn:
        """Exit from any thread: the main thread may wait for a collective that never ends."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                if stream.isatty():
                    stream.write("\x1b[?25h")  # the progress bar hides the cursor
                stream.flush()
        os._exit(status)


def _print(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads stderr
        print(line, file=sys.stderr, flush=True)


def _report_to_torchrun(line: str) -> None:
    """Write the line where torchrun looks for it when it reports a failed rank."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        record = {"message": {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with contextlib.suppress(OSError):
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(record))


def is_lost_connection(error: BaseException) -> bool:
    """Return whether a collective failed because of another rank."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )


def is_hosted_by_torchrun() -> bool:
    """Return whether torchrun hosts the store. Otherwise rank 0 hosts it."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
