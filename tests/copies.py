"""The ways in which users copy things, for tests that hold for each of them."""

import copy
import io
import pickle
from typing import Any

import torch


def with_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def with_torch_save(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": with_pickle, "torch.save": with_torch_save}
