"""What all tests share: no network, few threads, and the public data sets where they are."""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported, or it is not read
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # on tiny models a second thread only waits

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"

sys.path.insert(
    0, str(ROOT)
)  # so that plain `pytest` finds tests.models as `python -m pytest` does
sys.path.append(str(ROOT / "benchmarks"))  # last: some names there are also those of tests


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The public data sets beside the repository; a test that asks for them is marked `data`."""
    if not DATA.is_dir():
        pytest.skip(f"the data sets are not at {DATA}")
    return DATA


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `data` where the data sets are absent."""
    if DATA.is_dir():
        return
    for item in items:
        if item.get_closest_marker("data"):
            item.add_marker(pytest.mark.skip(reason=f"the data sets are not at {DATA}"))
