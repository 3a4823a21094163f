"""What must be true of a whole cell after every fact."""

from __future__ import annotations

from typing import cast

from actors.cell import Cell
from actors.gpu_state import GpuState
from actors.placement_state import PlacementState
from actors.request_state import RequestsState
from actors.store_state import StoreState


def check_invariants(cell: Cell) -> None:
    states = {name: actor.state for name, actor in cell.actors.items()}
    placement = cast(PlacementState, states.get("placement") or PlacementState())
    requests = cast(RequestsState, states.get("requests") or RequestsState())
    gpus = {name: cast(GpuState, state) for name, state in states.items() if name.startswith("gpu/")}
    stores = {name: cast(StoreState, state) for name, state in states.items() if name.startswith("store/")}
    _check_queues(placement, requests)
    _check_placed(placement, requests, gpus)
    _check_indexes(placement)
    _check_devices(placement, gpus)
    _check_dram(stores, gpus)
    assert list(requests.ended) == [n for n in requests.ended if requests.requests[n].status == "ended"]
    over = [n for n, r in requests.requests.items() if requests.over(r.choice.family if r.choice else n)]
    assert sorted(over) == sorted(requests.ended), "kept until all answers of a request have ended"
    for family in requests.families.values():
        known = [requests.requests[member] for member in family.members]
        assert family.running == sum(member.status != "ended" for member in known)
        assert family.running or not family.replies
    for link in cell.links.values():
        assert all(0 < number <= link.number for number in link.unanswered)


def _check_queues(placement: PlacementState, requests: RequestsState) -> None:
    assert placement.waiting == sum(len(queue) for queue in placement.queues.values())
    waiting = {}
    for model, queue in placement.queues.items():
        assert queue, "no empty queue stays"
        order = [one.accepted for one in queue.values()]
        assert order == sorted(order), "in order of acceptance"
        assert model in placement.models and not placement.models[model].removed
        waiting |= {(request, model): one.attempt for request, one in queue.items()}
    queued = {(n, r.model): r.attempt for n, r in requests.requests.items() if r.status == "queued"}
    assert waiting == queued, "who waits, waits there and here"


def _check_placed(placement: PlacementState, requests: RequestsState, gpus: dict[str, GpuState]) -> None:
    active = sorted(
        (request, worker, model, attempt)
        for worker, known in placement.workers.items()
        for model, instance in known.instances.items()
        for request, attempt in instance.active.items()
    )
    placed = {n: (p.worker, p.model, p.attempt) for n, p in placement.placed.items()}
    kept = [(n, p.worker, p.model, p.attempt) for n, p in placement.kept.items()]
    assert active == sorted([*((n, *place) for n, place in placed.items()), *kept])
    held = {
        one.request: (worker, one.model, one.attempt) for worker, gpu in gpus.items() for one in gpu.sequences.values()
    }
    assert held == placed, "what placement counts, runs"
    sealing = {
        one.request: (worker, one.model, one.attempt)
        for worker, gpu in gpus.items()
        for closed in gpu.sealing.values()
        for one in closed.sequences.values()
    }
    assert not held.keys() & sealing.keys(), "nothing runs before it is sealed"
    running = {n: (r.worker, r.model, r.attempt) for n, r in requests.requests.items() if r.status == "running"}
    assert running == held | sealing, "every running request is held by one worker, or about to be sealed"


def _check_indexes(placement: PlacementState) -> None:
    leased: dict[str, dict[str, int]] = {name: {} for name in placement.servers}
    draining = {}
    instances: dict[str, dict[str, bool]] = {name: {} for name in placement.models}
    indexed: dict[str, dict[int, dict[str, bool]]] = {name: {} for name in placement.models}
    for worker, known in placement.workers.items():
        for model, instance in known.instances.items():
            assert len(instance.active) <= instance.slots
            assert not instance.active or instance.status in ("running", "draining")
            leased[known.server][model] = leased[known.server].get(model, 0) + 1
            if instance.status != "stopping":
                instances[model][worker] = True
            free = (
                instance.slots - len(instance.active) if instance.status == "running" and not instance.outdated else 0
            )
            assert free == instance.free
            if free:
                indexed[model].setdefault(free, {})[worker] = True
            if instance.status == "draining":
                draining[(worker, model)] = True
    assert leased == {n: {m: one.workers for m, one in s.leased.items()} for n, s in placement.servers.items()}
    assert {n: m.instances for n, m in placement.models.items()} == instances
    assert {n: m.open for n, m in placement.models.items()} == indexed
    going = {model: True for worker in placement.workers.values() for model in worker.instances}
    for name, model in placement.models.items():
        assert model.servers or model.instances or name in going, "nothing is kept for nothing"
    victims = [victim for room in placement.room.values() for victim in room.victims]
    assert sorted(victims) == sorted(draining), "what drains, drains for one"
    assert all(model in placement.queues for model in placement.room)
    assert all(room.worker in placement.workers for room in placement.room.values())
    assert all(placement.models[model].removed for model in placement.removing)
    for model in placement.queues:
        known_model = placement.models[model]
        assert not known_model.open, "nobody waits beside a free slot"


def _check_devices(placement: PlacementState, gpus: dict[str, GpuState]) -> None:
    """A starting instance waits for those that go; so what counts is what stays, and what is attached now."""
    meaning = {
        "waiting": ("starting",), "attaching": ("starting",), "running": ("running", "draining"),
        "detaching": ("stopping",),
    }  # fmt: skip
    assert placement.workers.keys() == {name for name, gpu in gpus.items() if gpu.epoch}
    for name, worker in placement.workers.items():
        gpu = gpus[name]
        assert gpu.instances.keys() == worker.instances.keys()
        for model, instance in gpu.instances.items():
            assert worker.instances[model].status in meaning[instance.status]
        stays = [one.memory for one in worker.instances.values() if one.status != "stopping"]
        assert sum(stays) <= worker.memory_bytes
        attached = [worker.instances[m].memory for m, one in gpu.instances.items() if one.status != "waiting"]
        assert sum(attached) <= worker.memory_bytes
        assert all(one.leased for one in gpu.instances.values() if one.status != "waiting")


def _check_dram(stores: dict[str, StoreState], gpus: dict[str, GpuState]) -> None:
    for name, store in stores.items():
        used = sum(m.card.weight_bytes for m in store.models.values() if m.tier == "dram" or m.loading)
        assert used <= store.dram_bytes, f"{name} is within its budget"
        for model, stored in store.models.items():
            assert not stored.leases or stored.tier == "dram", "what is leased stays"
            assert not stored.waiting or stored.loading
            for worker in stored.leases:
                assert gpus[worker].instances[model].leased, "a lease is somebody's"
            for worker in stored.waiting:
                if worker.startswith("wish/"):
                    continue  # an operator's
                assert gpus[worker].instances[model].status == "waiting"
