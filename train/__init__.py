"""Train GPTs on text: data, the training loop, run folders, recipes and commands."""

if "." not in __name__:
    raise ModuleNotFoundError(
        "this folder is part of the package 'tritium': "
        "write 'import tritium.train', not 'import train'",
        name=__name__,
    )
