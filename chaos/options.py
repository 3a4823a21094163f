"""What a seed's world is made of: drawn once from the seed, printed when the seed fails.

Swarm testing: each world has only some kinds of fault and disturbance. The models are sized so that budgets are tight:
at least one fits everywhere, all of them together fit nowhere.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from random import Random
from typing import Any

import msgspec

from actors.rules import FIRST_RULES, KNOWN_RULES
from bus.messages import ModelCard
from chaos.faults import Odds, draw_odds

KIB = 1024
LONGEST_PROMPT = 2000
DISTURBANCES = ("crash", "cut", "freeze", "outage")


@dataclass(frozen=True, slots=True)
class Troubles:
    """How often (0 to 1 per occasion) machines fail by themselves; 0 is off."""

    load_failed: float = 0.0
    attach_failed: float = 0.0
    sequence_refused: float = 0.0
    engine_broken: float = 0.0
    source_failed: float = 0.0


@dataclass(frozen=True, slots=True)
class Options:
    """`disturb_every`: virtual seconds between disturbances, on average. `crash_at_record`: the chance that somebody
    dies as a record is stored, `crash_at_move` the same for those of the ledger during moves (chaos.deaths);
    `crash_at` is the number of the one record (counted over both logs, 0 for none) whose publisher dies then, before
    or after it learns of it. `wobble`: engines whose tokens depend on the engine, as in bf16. `removals`: how often
    the operator takes a model out. `moves`: how often it wants something moved (chaos.moves), `drains`: a server
    drained (chaos.drains). `several`: the share of requests that ask for several answers. `upgrade`: all controls
    begin as old programs and are replaced, the rules switched (chaos.upgrades). `snapshot_facts`: facts between two
    snapshots; `snapshot_trouble`: the chance that the writer of a piece dies, and that the disk loses a part of it;
    `generations`: whether the ledger's beginning is dropped now and then. `long_answers`: of 40 to 200 tokens.
    `longest_prompt`: prompts have up to so many tokens, and all begin early; 0: short ones at any time.
    `prefill_chunk`: tokens of prompts that an engine computes per step, each of which takes `step_ms` milliseconds on
    average. `eos_tokens`: so many of the stub's 1,000 tokens end an answer. `scattered`: no server holds all models.
    `rules`: the version that is switched to as the world begins. `sources`: models that can be fetched,
    which lie on few disks at first or on none; `ssd_bytes`: the budget of every disk, 0 for none; `serving`: servers
    fetch from each other; `remote_times`: as long a load from elsewhere takes as one from the disk.
    `slow_links`: as long a message takes as on one machine; `held`: the share of the models that lie on the disks of
    the servers but the first, which holds all; `answers`: how long answers may be, in tokens; empty: as usual.
    """

    seed: int
    controls: int
    servers: int
    workers: int
    models: tuple[ModelCard, ...]
    cursed: str
    dram_bytes: int
    memory_bytes: int
    max_slots: int
    requests: int
    fault_seconds: float
    dedupe_seconds: float
    deaths_limit: int
    wobble: bool
    odds: Odds = field(default_factory=Odds)
    troubles: Troubles = field(default_factory=Troubles)
    disturbances: tuple[str, ...] = ()
    disturb_every: float = 1.0
    crash_at_record: float = 0.0
    crash_at_move: float = 0.0
    removals: int = 0
    several: float = 0.15
    upgrade: bool = False
    moves: int = 0
    crash_at: int = 0
    crash_before_answer: bool = True
    snapshot_facts: int = 50
    snapshot_trouble: float = 0.0
    generations: bool = False
    long_answers: bool = False
    scattered: bool = False
    rules: int = FIRST_RULES
    longest_prompt: int = 0
    prefill_chunk: int = 64
    eos_tokens: int = 15
    step_ms: int = 20
    drains: int = 0
    sources: tuple[str, ...] = ()
    ssd_bytes: int = 0
    serving: bool = False
    remote_times: int = 1
    slow_links: int = 1
    held: float = 0.7
    answers: tuple[int, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For people and for JSON: the fault kinds that are on, with their odds."""
        said = asdict(self)
        said["models"] = {card.model: card.weight_bytes for card in self.models}
        said["odds"] = {name: getattr(self.odds, name) for name in self.odds.on()}
        said["troubles"] = {name: odds for name, odds in said["troubles"].items() if odds}
        return said


def draw(seed: int) -> Options:
    """The world of a seed. Under the rules before version 3 the number of an attempt may be given twice where a request
    that moves is to be moved again: what moves does so under the newest.
    """
    options = _on_disks(seed)
    if options.upgrade:
        return replace(options, moves=0)
    tiered = _tiered(options)
    return replace(tiered, rules=KNOWN_RULES[-1]) if tiered.moves else tiered


def _on_disks(seed: int) -> Options:
    """The same before any of its models lies elsewhere."""
    random = Random(f"options {seed}")
    cards = []
    for number in range(random.randint(2, 5)):
        cards.append(
            ModelCard(
                model=f"model-{number}",
                digest=f"digest-{number}",
                weight_bytes=random.randint(20, 100) * KIB,
                context=random.choice((48, 96, 128)),
                kv_bytes_per_token=random.choice((16, 32, 64)),
                vocabulary=1000,
                architecture="stub",
            )
        )
    largest = max(card.weight_bytes for card in cards)
    together = sum(card.weight_bytes for card in cards)
    need = max(card.weight_bytes + card.context * card.kv_bytes_per_token for card in cards)
    trouble = [random.random() * 0.1 if random.random() < 0.4 else 0.0 for _ in range(4)]
    disturbances = tuple(kind for kind in DISTURBANCES if random.random() < 0.5)
    options = Options(
        seed=seed,
        controls=random.choice((1, 2, 2, 3)),
        servers=random.randint(1, 3),
        workers=random.randint(1, 2),
        models=tuple(cards),
        cursed=random.choice(cards).model if random.random() < 0.15 else "",
        dram_bytes=max(largest, int(together * random.uniform(0.4, 0.9))),
        memory_bytes=int(need * random.uniform(1.0, 2.2)),
        max_slots=random.randint(1, 8),
        requests=random.randint(8, 40),
        fault_seconds=random.uniform(4.0, 9.0),
        dedupe_seconds=random.choice((0.3, 2.0, 120.0)),
        deaths_limit=random.choice((3, 100, 100)),
        wobble=random.random() < 0.5,
        odds=draw_odds(random),
        troubles=Troubles(*(round(odds, 3) for odds in trouble)),
        disturbances=disturbances,
        disturb_every=random.uniform(0.3, 2.5),
        crash_at_record=random.choice((0.0, 0.003, 0.01, 0.03)),
        removals=random.choice((0, 0, 0, 1, 3)),
        upgrade=Random(f"upgrade {seed}").random() < 0.4,
        moves=Random(f"moves {seed}").choice((0, 0, 5, 40, 120)),
        snapshot_facts=random.choice((4, 15, 60)),
        snapshot_trouble=random.choice((0.0, 0.0, 0.1, 0.4)),
        generations=random.random() < 0.4,
    )
    return _roomy(options) if options.moves >= 40 else options


def _tiered(options: Options) -> Options:
    """Of some worlds the same one with models that lie elsewhere at first, on disks that are too small for all."""
    random = Random(f"tiers {options.seed}")
    if random.random() < 0.6:
        return options
    sourced = [card for card in options.models if random.random() < 0.6] or [random.choice(options.models)]
    kept = sum(card.weight_bytes for card in options.models if card not in sourced)
    largest = max(card.weight_bytes for card in options.models)
    budget = kept + int(largest * random.uniform(1.0, 2.0))
    return replace(
        options,
        rules=KNOWN_RULES[-1],
        sources=tuple(card.model for card in sourced),
        ssd_bytes=random.choice((0, budget, budget)),
        serving=random.random() < 0.6,
        remote_times=random.choice((1, 4, 10)),
        removals=0,
        troubles=replace(options.troubles, source_failed=random.choice((0.0, 0.1, 0.3))),
    )


def _roomy(options: Options) -> Options:
    """The same world with places to move to."""
    weights = sum(card.weight_bytes for card in options.models)
    return replace(
        options,
        servers=max(2, options.servers),
        dram_bytes=weights,
        memory_bytes=2 * options.memory_bytes,
        max_slots=max(3, options.max_slots),
        requests=options.requests + 15,
    )


def soaked(seed: int) -> Options:
    """The world of a seed of the soak: mostly one in which operators move, some in which placement does by itself."""
    return crowded(seed) if Random(f"soaked {seed}").random() < 0.12 else moving(seed)


def moving(seed: int) -> Options:
    """A world of long prompts and answers, of which its operators move and drain much, with deaths at any message.

    Prefill is some ten times as fast per token as decoding, so catching up takes rounds; in most worlds moves are made
    to take long (`_lingering`). The other faults are off in half of the worlds and rarer in the rest: moves that never
    get anywhere show nothing.
    """
    options = _far(seed)
    return _lingering(options) if Random(f"lingering {seed}").random() < 0.75 else options


def _lingering(options: Options) -> Options:
    """The same world such that more of a move's messages fall between its first round and the first page elsewhere.

    Prompts are short and answers long, so that what is moved decodes already and goes on for as long as following it
    takes; prefill is a few times as fast as decoding, which makes rounds; there is room at every server; and messages
    take as long as between sites, so that others happen between those of a move.
    """
    random = Random(f"lingers {options.seed}")
    return replace(
        options,
        held=1.0,
        workers=2,
        max_slots=random.randint(5, 8),
        memory_bytes=2 * options.memory_bytes,
        answers=(200, 300, 400),
        eos_tokens=1,
        longest_prompt=random.choice((100, 200)),
        prefill_chunk=random.choice((3, 4, 6)),
        slow_links=random.choice((1, 20, 60, 100)),
        requests=random.randint(5, 9),
        moves=random.choice((6, 10, 16)),
        drains=random.choice((0, 0, 1, 2)),
    )


def _far(seed: int) -> Options:
    """A world of prompts that take long to compute, and many wishes of its operators."""
    random = Random(f"moving {seed}")
    options = _roomy(_on_disks(seed))
    cards = tuple(msgspec.structs.replace(card, context=LONGEST_PROMPT + 240) for card in options.models)
    weights = sum(card.weight_bytes for card in cards)
    slot = max(card.context * card.kv_bytes_per_token for card in cards)
    return replace(
        options,
        models=cards[:3],
        cursed="",
        memory_bytes=weights + 3 * 5 * slot,
        max_slots=random.randint(3, 5),
        moves=random.choice((10, 20, 40)),
        drains=random.choice((0, 0, 1, 3, 6)),
        long_answers=True,
        longest_prompt=LONGEST_PROMPT,
        prefill_chunk=random.choice((8, 12, 20)),
        step_ms=random.choice((20, 40)),
        crash_at_move=random.choice((0.005, 0.02, 0.05)),
        crash_at_record=0.0,
        disturbances=options.disturbances if random.random() < 0.3 else (),
        odds=options.odds if random.random() < 0.5 else Odds(),
        troubles=options.troubles if random.random() < 0.3 else Troubles(),
        requests=random.randint(6, 14),
        several=0.1,
        removals=0,
        rules=KNOWN_RULES[-1],
        fault_seconds=random.uniform(5.0, 10.0),
        upgrade=False,
        eos_tokens=4,
    )


def crowded(seed: int) -> Options:
    """A world of long answers in which more models are wanted than devices hold: what runs moves away for others."""
    options = _roomy(_on_disks(seed))
    random = Random(f"crowded {seed}")
    cards = tuple(msgspec.structs.replace(card, context=512, kv_bytes_per_token=32) for card in options.models)
    most = max(card.weight_bytes + card.context * card.kv_bytes_per_token for card in cards)
    return replace(
        options,
        models=cards,
        servers=random.randint(3, 4),
        workers=random.choice((1, 2)),
        memory_bytes=int(most * random.choice((1.0, 1.1))),
        max_slots=random.randint(2, 8),
        long_answers=True,
        upgrade=options.upgrade and random.random() < 0.3,
        requests=random.randint(8, 20),
        moves=random.choice((0, 0, 20)),
        scattered=True,
        rules=KNOWN_RULES[-1],
        crash_at_move=random.choice((0.0, 0.01, 0.05)),
        crash_at_record=random.choice((0.0, 0.003)),
        removals=random.choice((0, 0, 1)),
    )


def calm(seed: int) -> Options:
    """The same world without any fault."""
    return replace(
        draw(seed),
        cursed="",
        odds=Odds(),
        troubles=Troubles(),
        disturbances=(),
        crash_at_record=0.0,
        removals=0,
        upgrade=False,
        moves=0,
        drains=0,
        wobble=False,
        snapshot_trouble=0.0,
    )
