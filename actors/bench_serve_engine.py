"""The engine called directly, in a process of its own: what `longshore bench serve` holds the served cell against.

python -m actors.bench_serve_engine DIRECTORY CONTEXT

It says `ready` once the packed model of the directory is loaded; each line on its input is then one batch
(`{"prompts": [...], "max_tokens": n}`), and one line of JSON says how it went.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from models.contract import Sampling, SequenceStart
from models.instance import Instance


def main() -> None:
    import torch

    from loaders import open_checkpoint
    from models.instance import load_instance

    torch.set_num_threads(1)
    directory, context = Path(sys.argv[1]), int(sys.argv[2])
    checkpoint = open_checkpoint(directory, verify=False, populate=True)
    instance = load_instance(directory, checkpoint.tensors, kv_bytes=1 << 33, max_slots=16, context=context)
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(run_batch(instance, asked["prompts"], asked["max_tokens"])), flush=True)


def run_batch(instance: Instance, prompts: list[str], max_tokens: int) -> dict[str, float]:
    """All prompts at once, to their end: tokens, seconds from the first admission, CPU seconds, median step."""
    engine = instance.engine
    began, cpu = time.perf_counter(), time.process_time()
    for number, prompt in enumerate(prompts):
        sampling = Sampling(max_tokens, min_tokens=max_tokens)
        engine.admit(SequenceStart(str(number), tuple(instance.encode_prompt(prompt)), (), sampling))
    tokens, steps = 0, []
    while engine.active():
        before = time.perf_counter()
        events = engine.step()
        tokens += len(events)
        if len(events) == len(prompts):
            steps.append(time.perf_counter() - before)
    return {
        "tokens": tokens,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "step_ms": sorted(steps)[len(steps) // 2] * 1000 if steps else 0.0,
    }


if __name__ == "__main__":
    main()
