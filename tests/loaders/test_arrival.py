"""What a store tells of a load, as another process sees it: chunk by chunk, to a good end, a bad one, or none."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from loaders.arrival import Announcement, Arrival, Interrupted, remove_leftovers
from loaders.layer_gate import LayerGate

DIES = """
import os, sys
from pathlib import Path
from loaders.arrival import Announcement
told = Announcement(Path(sys.argv[1]), "d")
told.begin(Path("/weights"), 3)
told.arrived(0)
os._exit(0)
"""


def never() -> bool:
    return False


def test_chunks_are_waited_for_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "arrivals" / "m"
    assert Arrival.find(path) is None
    told = Announcement(path, "d")
    told.begin(Path("/weights"), 4)
    seen = Arrival.find(path)
    assert seen is not None and (seen.digest, seen.weights, seen.chunks) == ("d", Path("/weights"), 4)
    told.arrived(1)
    assert seen.has(1, 2) and not seen.has(0, 2) and not seen.has(1, 3)
    waiting = threading.Thread(target=seen.wait, args=(0, 2, never))
    waiting.start()
    assert waiting.is_alive()
    told.arrived(0)
    waiting.join(10)
    assert not waiting.is_alive() and seen.coming and not seen.here
    with pytest.raises(Interrupted, match="somebody else"):
        seen.wait(2, 4, lambda: True)
    told.end(whole=True)
    assert seen.here and not seen.coming and seen.has(0, 4)
    seen.wait(0, 4, never)
    assert Arrival.find(path) is None, "who comes later is not told"


def test_a_load_that_fails_and_one_whose_store_dies_are_not_waited_for(tmp_path: Path) -> None:
    told = Announcement(tmp_path / "m", "d")
    told.begin(Path("/weights"), 2)
    told.arrived(0)
    seen = Arrival.find(tmp_path / "m")
    assert seen is not None
    told.end(whole=False)
    with pytest.raises(Interrupted, match="does not come any more"):
        seen.wait(0, 2, never)
    subprocess.run([sys.executable, "-c", DIES, str(tmp_path / "n")], check=True)
    assert (tmp_path / "n").exists() and Arrival.find(tmp_path / "n") is None
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_told_stops_no_load_and_what_is_no_arrival_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for path in (None, tmp_path / "file" / "m"):
        told = Announcement(path, "d")
        told.begin(Path("/weights"), 2)
        told.arrived(1)
        told.end(whole=True)
    for content in (b"", b"{}", b"x" * 5000, b'{"digest":"d","weights":"/w","chunks":9}'.ljust(4096)):
        (tmp_path / "odd").write_bytes(content)
        assert Arrival.find(tmp_path / "odd") is None


class Net(torch.nn.Module):
    """Two layers, of which a part is used past its own forward pass, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(2, 2)
        self.layers = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(2, 2)) for _ in range(2))
        self.head = torch.nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return torch.nn.functional.linear(x, self.head.weight)


def test_every_part_waits_for_its_own_tensors_before_it_computes() -> None:
    net, waited, told = Net(), list[str](), list[list[str]]()

    def wait(names: list[str]) -> None:
        told.append(names)
        if len(told) == len(waited):
            raise Interrupted("enough")

    gate = LayerGate(net, dict(net.state_dict(keep_vars=True)), wait)
    net(torch.zeros(1, 2))
    of_layers = [[f"layers.{number}.0.weight", f"layers.{number}.0.bias"] for number in range(2)]
    assert told == [["first.weight", "first.bias"], *of_layers]
    assert not gate.passed, "the head was used, and nobody waited for it"
    net.head(torch.zeros(1, 2))
    assert gate.passed
    told.clear()
    waited[:] = ["first", "second"]
    with pytest.raises(Interrupted):
        net(torch.zeros(1, 2))
    assert len(told) == 2, "what is behind it did not compute"
    gate.open()
    net(torch.zeros(1, 2))
    assert len(told) == 2
