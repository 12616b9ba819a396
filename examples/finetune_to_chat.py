"""From text to a chat model: pretrain, fine-tune on instructions, and ask questions.

    python examples/finetune_to_chat.py [OUT_DIR]

The text says what the capital of each country is, in three ways. The records ask for the capitals of
all countries but the last four. A model that has learned both answers for these four too: it knows the
facts from the text and the form of an answer from the records. Four steps of the Python API:

    run = tritium.train("laptop", data="facts.txt", ...)         `tritium train`
    tuned = tritium.finetune("instruct", run, "records.jsonl")   `tritium finetune instruct`
    chat = Conversation(tuned.model, tuned.tokenizer, ...)       `tritium chat`
    chat.ask("What is the capital of Italy?")

With records and a model of your own, the last three steps are the same. The output, after the progress
of both runs, which take @SECONDS@ on one core of an AMD EPYC:

@OUTPUT@
"""

import json
import random
import sys
from pathlib import Path

import tritium
from tritium.model.generation import Sampling
from tritium.train.chat import Conversation

CAPITALS = {
    **{"France": "Paris", "Spain": "Madrid", "Portugal": "Lisbon", "Austria": "Vienna"},
    **{"Greece": "Athens", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki"},
    **{"Poland": "Warsaw", "Hungary": "Budapest", "Ireland": "Dublin", "Denmark": "Copenhagen"},
    **{"Egypt": "Cairo", "Kenya": "Nairobi", "Japan": "Tokyo", "Peru": "Lima"},
    **{"Cuba": "Havana", "Chile": "Santiago", "Turkey": "Ankara", "Iraq": "Baghdad"},
    **{"Italy": "Rome", "Germany": "Berlin", "Russia": "Moscow", "China": "Beijing"},
}
HELD_OUT = list(CAPITALS)[-4:]
SENTENCES = (
    "The capital of {country} is {city}.",
    "{city} is the capital of {country}.",
    "Q: What is the capital of {country}? A: {city}.",
)
MODEL = {"n_layer": 4, "n_head": 4, "d_model": 128, "context_tokens": 128, "tokenizer": "bytes"}


def write_data(folder: Path) -> tuple[Path, Path]:
    """Write the text and the records. Returns: their paths."""
    draw = random.Random(0)
    lines = []
    for _ in range(3_000):
        country, city = draw.choice(list(CAPITALS.items()))
        lines.append(draw.choice(SENTENCES).format(country=country, city=city))
    text = folder / "facts.txt"
    text.write_text("\n".join(lines))
    records = folder / "records.jsonl"
    with open(records, "w", encoding="utf-8") as file:
        for country, city in CAPITALS.items():
            if country not in HELD_OUT:
                question = f"What is the capital of {country}?"
                record = {"instruction": question, "output": f"{city}."}
                file.write(json.dumps(record) + "\n")
    return text, records


def main(out: str = "capitals", steps: int = 300, epochs: float = 30.0, **options) -> list[str]:
    """Train, fine-tune and ask. Returns: the answers."""
    folder = Path(out)
    folder.mkdir(parents=True)
    text, records = write_data(folder)
    run = tritium.train(
        "laptop", data=text, out=folder / "pretrained", steps=steps, **MODEL | options
    )
    tuned = tritium.finetune(
        "instruct", run, records, out=folder / "tuned", epochs=epochs, lr=1e-3, test_fraction=0.0
    )

    chat = Conversation(
        tuned.model,
        tuned.tokenizer,
        Sampling(max_new_tokens=16, temperature=0.0),
        template="plain",
    )
    answers = []
    for country in HELD_OUT:
        question = f"What is the capital of {country}?"
        answers.append("".join(chat.ask(question)).strip())
        print(f"{question} {answers[-1]}")
        chat.reset()
    return answers


if __name__ == "__main__":
    main(*sys.argv[1:])
