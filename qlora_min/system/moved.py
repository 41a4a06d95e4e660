"""Importing a module that an earlier version's README documented raises an error that says where it is now."""

import sys

MOVED = {
    "qlora_min.train": "qlora_min.run.trainer.Trainer, or qlora_min.train(...)",
    "qlora_min.care": "qlora_min.cli.data.look_at",
    "qlora_min.report": "the command `qlora-min compare`",
}


def find_spec(name: str, path: object = None, target: object = None) -> None:
    if name in MOVED:
        raise ModuleNotFoundError(f"{name} has moved: it is now {MOVED[name]}", name=name)


sys.meta_path.append(sys.modules[__name__])  # a finder is any object with `find_spec`
