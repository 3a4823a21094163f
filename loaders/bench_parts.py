"""The smaller parts of `longshore bench load`: a start from DRAM, fetching, two loads at once, a first token."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from loaders.bench_checkpoint import make_checkpoint, make_packed
from loaders.bench_load import drop_cache, read_through, warm_memory
from loaders.dram_tier import DramTier
from loaders.errors import CheckpointError
from loaders.fetch import fetch_checkpoint
from loaders.load import READ_THREADS, load_checkpoint
from loaders.mapping import FileMapping
from loaders.memory import MemoryPool
from loaders.packed import WEIGHTS_NAME
from loaders.page_cache_tier import PageCacheTier
from loaders.plan import plan_load
from loaders.read_threads import PREFETCH, URGENT, ReadThreads
from loaders.shared_memory_tier import SharedMemoryTier, weights_directory

Tell = Callable[[str], None]


class AttachRow(msgspec.Struct, frozen=True):
    """A start from DRAM: milliseconds until all views are there, and until every page was touched, of all runs."""

    bytes: int
    tensors: int
    memory: str
    views_ms: tuple[float, ...]
    touched_ms: tuple[float, ...]


_ATTACH = """
import sys, json, time, torch
from pathlib import Path
from loaders.checkpoint import open_checkpoint
from loaders.bench_child import touch
touch({"": torch.zeros(10_000, dtype=torch.bfloat16)})
began = time.perf_counter()
mapped = open_checkpoint(Path(sys.argv[1]), verify=False, populate=False)
viewed = time.perf_counter()
touch(mapped.tensors)
ended = time.perf_counter()
print(json.dumps([(viewed - began) * 1e3, (ended - began) * 1e3, len(mapped.tensors)]))
"""


def bench_attach(folder: Path, tensor_bytes: int, *, runs: int, tensors: int = 1000, tell: Tell) -> list[AttachRow]:
    """DRAM to usable parameters in a fresh process, interleaved: every DRAM tier that this system grants.

    Shared memory with huge pages needs a tmpfs of its own, which only root may mount; otherwise its row is missing.
    """
    name = f"{tensor_bytes / 1e9:g}gb-{tensors}"
    tell(f"{tensor_bytes / 1e9:g} GB of {tensors} tensors, from DRAM")
    packed = make_packed(make_checkpoint(folder / f"source-{name}", tensor_bytes, tensors), folder / f"packed-{name}")
    size = (packed / WEIGHTS_NAME).stat().st_size
    small = Path("/dev/shm") / f"longshore-bench-{os.getpid()}"
    places: dict[str, Path] = {}
    found: dict[str, list[list[float]]] = {}
    with contextlib.ExitStack() as stack:
        stack.callback(SharedMemoryTier.remove, small)
        roots = []
        mount = folder / "huge"
        mount.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"huge=advise,size={size * 2}", "tmpfs", str(mount)]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            stack.callback(subprocess.run, ["umount", "-l", str(mount)], check=False)
            roots.append(mount / "longshore")
        roots.append(small)  # last: what needs huge pages comes while whole ones are free
        drop_cache([])
        tiers: list[DramTier] = [PageCacheTier(None), *(SharedMemoryTier(root) for root in roots)]
        for tier in tiers:
            tier.bring(packed)
            place = packed if tier.weights_root is None else weights_directory(tier.weights_root, packed)
            kind_of_memory = "page cache of the packed file" if tier.weights_root is None else "shared memory"
            mapping = FileMapping(place / WEIGHTS_NAME)
            mapping.want_huge_pages()
            mapping.populate(0, mapping.bytes)
            kind = mapping.page_kind()
            pages = f"{kind.huge_share:.0%} huge pages" if kind else "pages unknown"
            del mapping
            places[f"{kind_of_memory}, {pages}"] = place
        for number in range(runs):
            tell(f"a start from each kind of DRAM, run {number + 1} of {runs}")
            for memory, place in places.items():
                found.setdefault(memory, []).append(json.loads(_python(_ATTACH, str(place))))
    return [
        AttachRow(size, int(rows[0][2]), memory, tuple(one[0] for one in rows), tuple(one[1] for one in rows))
        for memory, rows in found.items()
    ]


class FetchRow(msgspec.Struct, frozen=True):
    """http from nginx on loopback onto this disk: GB/s of this room and of `curl`, run by run, and the median ratio."""

    bytes: int
    ours: tuple[float, ...]
    curl: tuple[float, ...]

    @property
    def ratio(self) -> float:
        return statistics.median(a / b for a, b in zip(self.ours, self.curl, strict=True))


def bench_fetch(folder: Path, packed: Path, *, runs: int, tell: Tell) -> FetchRow | None:
    """None where nginx or curl is not installed. Both end with what they wrote in memory and on the disk (fsync).

    Before each of either, as much memory as the weights take was touched and freed.
    """
    nginx = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
    if nginx is None or shutil.which("curl") is None:
        return None
    ours, curl = [], []
    size = (packed / WEIGHTS_NAME).stat().st_size
    read_through([packed / WEIGHTS_NAME])  # the server has it in memory: its disk is not what is measured
    with _nginx(nginx, packed, folder / "nginx") as url:
        target = folder / "fetched"
        for number in range(runs):
            tell(f"http from nginx, run {number + 1} of {runs}")
            shutil.rmtree(target, ignore_errors=True)
            warm_memory(size)
            began = time.perf_counter()
            fetch_checkpoint(url, target)
            ours.append(size / (time.perf_counter() - began) / 1e9)
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            warm_memory(size)
            began = time.perf_counter()
            subprocess.run(["curl", "-s", "-o", str(target / "f"), f"{url}/{WEIGHTS_NAME}"], check=True)
            with (target / "f").open("rb") as file:
                os.fsync(file.fileno())
            curl.append(size / (time.perf_counter() - began) / 1e9)
        shutil.rmtree(target, ignore_errors=True)
    return FetchRow(size, tuple(ours), tuple(curl))


class TogetherRow(msgspec.Struct, frozen=True):
    """Two loads of one server: seconds one after the other, at once, and of the one with priority, alone and not."""

    after_each_other: tuple[float, ...]
    at_once: tuple[float, ...]
    alone: tuple[float, ...]
    with_priority: tuple[float, ...]


def bench_together(first: Path, second: Path, *, runs: int, tell: Tell) -> TogetherRow:
    """Cold, into pools that are faulted in. `first` is waited for, `second` is a prefetch."""
    pools = [MemoryPool(plan_load(path).memory_bytes) for path in (first, second)]
    files = [first / WEIGHTS_NAME, second / WEIGHTS_NAME]
    figures: dict[str, list[float]] = {"serial": [], "both": [], "alone": [], "priority": []}
    for number in range(runs):
        tell(f"two loads at once, run {number + 1} of {runs}")
        drop_cache(files)
        began = time.perf_counter()
        load_checkpoint(first, pool=pools[0]).close()
        figures["alone"].append(time.perf_counter() - began)
        load_checkpoint(second, pool=pools[1]).close()
        figures["serial"].append(time.perf_counter() - began)
        drop_cache(files)
        readers = ReadThreads(READ_THREADS)
        ended: dict[int, float] = {}

        def load(index: int, readers: ReadThreads = readers, ended: dict[int, float] = ended) -> None:
            path, priority = (first, URGENT) if index == 0 else (second, PREFETCH)
            load_checkpoint(path, pool=pools[index], readers=readers, priority=priority).close()
            ended[index] = time.perf_counter()

        began = time.perf_counter()
        threads = [threading.Thread(target=load, args=(index,)) for index in (1, 0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        readers.close()
        figures["both"].append(max(ended.values()) - began)
        figures["priority"].append(ended[0] - began)
    return TogetherRow(*(tuple(figures[name]) for name in ("serial", "both", "alone", "priority")))


class FirstTokenRow(msgspec.Struct, frozen=True):
    """Seconds from a cold start to the first token, with the prefill after the load and during it, run by run."""

    prompt_tokens: int
    load_seconds: float
    prefill_seconds: float
    after: tuple[float, ...]
    during: tuple[float, ...]

    @property
    def ratio(self) -> float:
        return statistics.median(a / b for a, b in zip(self.after, self.during, strict=True))


_FIRST_TOKEN = """
import sys, json, time, torch, transformers
from pathlib import Path
from loaders.hf import from_pretrained, finish_loading
from loaders.memory import MemoryPool
from loaders.plan import plan_load
path, wait, tokens = Path(sys.argv[1]), sys.argv[2] == "after", int(sys.argv[3])
_ = transformers.LlamaForCausalLM
pool = MemoryPool(plan_load(path).memory_bytes)
prompt = torch.randint(3, 1000, (1, tokens))
warm = transformers.LlamaForCausalLM(transformers.LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=1, num_key_value_heads=1, vocab_size=100)).bfloat16()
with torch.inference_mode():
    warm(prompt % 100)
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    model = from_pretrained(path, pool=pool, wait=wait)
    loaded = time.perf_counter()
    model(prompt, logits_to_keep=1).logits.argmax().item()
    first = time.perf_counter()
    seconds = finish_loading(model).seconds
    again = time.perf_counter()
    model(prompt, logits_to_keep=1).logits.argmax().item()
    prefill = time.perf_counter() - again
print(json.dumps([first - began, seconds, prefill]))
"""


def bench_first_token(packed: Path, *, runs: int, tell: Tell) -> FirstTokenRow:
    """Cold; the prompt is made so long that its prefill takes about half of the load."""
    tokens = 32

    def once(when: str) -> list[float]:
        return list(json.loads(_python(_FIRST_TOKEN, str(packed), when, str(tokens), before=lambda: drop_cache(files))))

    files = [packed / WEIGHTS_NAME]
    for attempt in range(6):
        tell(f"first token: how long the prompt has to be, try {attempt + 1} with {tokens} tokens")
        _, load_seconds, prefill = once("after")
        if load_seconds / 3 <= prefill <= load_seconds:
            break
        tokens = max(1, min(4000, int(tokens * 0.6 * load_seconds / prefill)))
    after, during, loads, prefills = [], [], [], []
    for number in range(runs):
        tell(f"first token, run {number + 1} of {runs}, {tokens} tokens in")
        total, load_seconds, prefill = once("after")
        after.append(total)
        loads.append(load_seconds)
        prefills.append(prefill)
        during.append(once("during")[0])
    return FirstTokenRow(tokens, statistics.median(loads), statistics.median(prefills), tuple(after), tuple(during))


def _python(program: str, *arguments: str, before: Callable[[], Any] | None = None) -> str:
    """The last line that a program says in a process of its own; `before` runs once it says `ready`."""
    environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as child:
        assert child.stdout is not None
        if before is not None and child.stdout.readline().strip() == "ready":
            before()
        output, errors = child.communicate("go\n", timeout=600)
    if child.returncode != 0:
        raise CheckpointError(f"a part of the bench failed: {(errors.strip().splitlines() or ['no message'])[-1]}")
    return output.strip().splitlines()[-1]


class _nginx:
    """A real nginx that serves one directory on loopback."""

    def __init__(self, binary: str, directory: Path, folder: Path) -> None:
        import socket

        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port: int = probe.getsockname()[1]
        paths = "".join(
            f"{name}_temp_path {folder / name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        user = "user root;\n" if os.geteuid() == 0 else ""
        (folder / "nginx.conf").write_text(
            f"daemon off;\n{user}pid {folder / 'pid'};\nerror_log {folder / 'error.log'};\nevents {{}}\n"
            f"http {{\naccess_log off;\nsendfile on;\n{paths}"
            f"server {{ listen 127.0.0.1:{self._port}; root {directory}; }}\n}}\n"
        )
        self._command = [binary, "-c", str(folder / "nginx.conf"), "-p", str(folder)]

    def __enter__(self) -> str:
        import socket

        self._process = subprocess.Popen(self._command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
                return f"http://127.0.0.1:{self._port}"
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise CheckpointError("nginx does not start: look at its error.log in the bench's folder") from None
                time.sleep(0.02)

    def __exit__(self, *exception: object) -> None:
        self._process.terminate()
        self._process.wait(10)
