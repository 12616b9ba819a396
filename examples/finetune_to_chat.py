"""From text to a chat model: pretrain, fine-tune on instructions, and ask questions.

    python examples/finetune_to_chat.py [OUT_DIR]

The model first learns sentences about capitals, then to answer questions about them:

    run = tritium.train("laptop", data="facts.txt", ...)         `tritium train`
    tuned = tritium.finetune("instruct", run, "records.jsonl")   `tritium finetune instruct`
    chat = Conversation(tuned.model, tuned.tokenizer, ...)       `tritium chat`
    chat.ask("What is the capital of Peru?")

The output, after the progress of both runs:

    What is the capital of Peru? Lima.
    What is the capital of Norway? Oslo.
    What is the capital of Japan? Tokyo.
"""

import json
import random
import sys
from pathlib import Path

import tritium
from tritium.model.generation import Sampling
from tritium.train.generation.chat import Conversation

CAPITALS = {
    **{"France": "Paris", "Spain": "Madrid", "Portugal": "Lisbon", "Austria": "Vienna"},
    **{"Greece": "Athens", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki"},
    **{"Poland": "Warsaw", "Hungary": "Budapest", "Ireland": "Dublin", "Denmark": "Copenhagen"},
    **{"Egypt": "Cairo", "Kenya": "Nairobi", "Japan": "Tokyo", "Peru": "Lima"},
    **{"Cuba": "Havana", "Chile": "Santiago", "Turkey": "Ankara", "Iraq": "Baghdad"},
    **{"Italy": "Rome", "Germany": "Berlin", "Russia": "Moscow", "China": "Beijing"},
}
ASKED = ("Peru", "Norway", "Japan")
SENTENCES = (
    "The capital of {country} is {city}.",
    "{city} is the capital of {country}.",
    "The city of {city} is in {country}.",
)
MODEL = {"n_layer": 2, "n_head": 4, "d_model": 128, "context_tokens": 64, "tokenizer": "bytes"}


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
            question = f"What is the capital of {country}?"
            record = {"instruction": question, "output": f"{city}."}
            file.write(json.dumps(record) + "\n")
    return text, records


def main(out: str = "capitals", steps: int = 150, tuning_steps: int = 100) -> list[str]:
    """Train, fine-tune and ask. Returns: the answers."""
    folder = Path(out)
    folder.mkdir(parents=True)
    text, records = write_data(folder)
    run = tritium.train("laptop", data=text, out=folder / "pretrained", steps=steps, **MODEL)
    tuned = tritium.finetune(
        "instruct", run, records, out=folder / "tuned", steps=tuning_steps, lr=2e-3
    )

    sampling = Sampling(max_new_tokens=16, temperature=0.0)
    chat = Conversation(tuned.model, tuned.tokenizer, sampling, template="plain")
    answers = []
    for country in ASKED:
        question = f"What is the capital of {country}?"
        answers.append("".join(chat.ask(question)).strip())
        print(f"{question} {answers[-1]}")
        chat.reset()
    return answers


if __name__ == "__main__":
    main(*sys.argv[1:])
