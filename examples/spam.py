"""Compare a fine-tuned model with a model without pretraining and with a bag of words.

    python examples/spam.py MODEL FILE OUT_DIR [--seeds 5] [--only pretrained|random|words]

MODEL is a run or a checkpoint. FILE has a label and a text per line, without names: sms-spam.tsv of
the UCI SMS Spam Collection. For each seed, the texts are split into 70 % for training, 10 % for
validation and 20 % for the test, with as many texts of each label (balanced) and with all texts
(full). Three classifiers see the same parts:

    pretrained   `tritium finetune classify` from MODEL, all weights
    random       the same from a model of the same shape with new weights
    words        TF-IDF of words and logistic regression (needs scikit-learn)

The results are runs and JSON files in OUT_DIR. Results that exist are not computed again.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from tritium.model import GPT
from tritium.train.finetune.classify_metrics import Confusion
from tritium.train.finetune.classify_records import (
    Parts,
    balanced,
    read_labelled_texts,
    split_texts,
    without_copies,
)
from tritium.train.finetune.start import finetune_config
from tritium.train.loop import start
from tritium.train.run.models import open_model

SETS = {"balanced": {"balance": True, "epochs": 2.0}, "full": {"balance": False, "epochs": 1.0}}
OPTIONS = {
    "text_column": "2",
    "label_column": "1",
    "val_fraction": 0.1,
    "test_fraction": 0.2,
    "batch_size": 16,
    "lr": 5e-4,
    "keep_checkpoints": 1,
}
CLASSIFIERS = ("pretrained", "random", "words")


def parts_of(file: Path, set_name: str, seed: int) -> Parts:
    """Return the parts that a run with this seed uses."""
    texts, _ = without_copies(read_labelled_texts(file, "2", "1"))
    if SETS[set_name]["balance"]:
        texts = balanced(texts, seed)
    return split_texts(texts, val_fraction=0.1, test_fraction=0.2, seed=seed)


def bag_of_words(parts: Parts) -> dict:
    """Fit on the training part. C is chosen on the validation part. Return the test results."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    split = {name: getattr(parts, name) for name in ("train", "val", "test")}
    texts = {name: [each.text for each in part] for name, part in split.items()}
    label = {name: np.array([parts.labels.index(each.label) for each in part])
             for name, part in split.items()}  # fmt: skip
    words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), token_pattern=r"\w+|[^\w\s]")
    features = {"train": words.fit_transform(texts["train"])}
    features |= {name: words.transform(texts[name]) for name in ("val", "test")}
    models = [
        LogisticRegression(C=C, max_iter=1_000).fit(features["train"], label["train"])
        for C in (1, 10, 100, 1_000)
    ]
    best = max(models, key=lambda model: model.score(features["val"], label["val"]))
    found = Confusion.of(parts.labels, label["test"], best.predict(features["test"]))
    return found.numbers() | {"texts": len(split["test"])}


def random_model(trained: Path, folder: Path) -> Path:
    """Write a model of the same shape and tokenizer, with new weights."""
    if not folder.exists():
        saved = open_model(trained)
        torch.manual_seed(0)
        GPT(saved.config).save_pretrained(folder)
        saved.tokenizer().save(folder / "tritium_tokenizer.json")
    return folder


def main() -> None:
    """Train and test what is missing in OUT_DIR, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", choices=CLASSIFIERS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = [options.only] if options.only else CLASSIFIERS
    for seed in range(options.seeds):
        for set_name in SETS:
            for classifier in chosen:
                run = options.out / f"{set_name}-{classifier}-{seed}"
                if (run / "test.json").exists():
                    continue
                if classifier == "words":
                    run.mkdir(exist_ok=True)
                    results = bag_of_words(parts_of(options.file, set_name, seed))
                    (run / "test.json").write_text(json.dumps(results))
                    continue
                model = options.model
                if classifier == "random":
                    model = random_model(model, options.out / "random-model")
                settings = OPTIONS | SETS[set_name] | {"seed": seed}
                start(finetune_config("classify", model, options.file, **settings), run)
    print_table(options.out)


def print_table(out: Path) -> None:
    """Print the mean and the standard deviation over seeds, in percent."""
    print("| texts | classifier | seeds | accuracy | macro F1 | F1 of spam |")
    print("|---|---|---|---|---|---|")
    for set_name in SETS:
        for classifier in CLASSIFIERS:
            files = out.glob(f"{set_name}-{classifier}-*/test.json")
            found = [json.loads(file.read_text()) for file in files]
            if not found:
                continue
            cells = [set_name, classifier, str(len(found))]
            for name in ("accuracy", "f1", "f1/spam"):
                values = 100 * np.array([each[name] for each in found])
                spread = values.std(ddof=1) if len(values) > 1 else 0.0
                cells.append(f"{values.mean():.2f} ± {spread:.2f}")
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
