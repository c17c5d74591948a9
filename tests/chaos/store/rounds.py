"""Attempts of one job that start, save, prune and die, one fault each, with a check after each."""

from __future__ import annotations

import random
import shutil
import uuid
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from finetune_api.guards import GuardState, Rollback, RollbackReason
from finetune_trainer.store import files
from finetune_trainer.store.checkpoints import Start, list_checkpoints, restore, start_attempt
from finetune_trainer.store.errors import CheckpointInvalid, NodeFilesMissing, StorageUnavailable, Superseded
from finetune_trainer.store.nodes import NodeUploader
from finetune_trainer.store.objects import ObjectStore
from finetune_trainer.store.writer import CheckpointWriter
from tests.chaos.store.faults import Fault, FaultyStore, Killed, Plan
from tests.chaos.store.ledger import MANIFEST, Content, Ledger, Violation

ROUNDS_PER_OUTPUT = 40
_TRIES = 3
_OVERTAKEN = {Fault.OVERTAKEN_BEFORE, Fault.OVERTAKEN_AFTER}
DAMAGE = ("part flipped", "part cut", "part dropped", "old manifest replayed", "removed manifest replayed")


@dataclass
class Tally:
    """What was done: faults by kind, the calls they happened to, and the checks made."""

    faults: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    checks: Counter[str] = field(default_factory=Counter)
    outputs: int = 0

    @property
    def count(self) -> int:
        """All faults."""
        return self.faults.total()


class Chaos:
    """Runs rounds against one real store until enough faults have happened.

    store: the real one. root: the folder in which its objects lie, by key. work: a folder for local files.
    """

    def __init__(self, store: ObjectStore, root: Path, work: Path, seed: int) -> None:
        self._store = store
        self._root = root
        self._work = work
        self._random = random.Random(seed)
        self._kinds = list(Fault)
        self._round = 0
        self._longest = 40
        self.tally = Tally()

    def run(self, faults: int) -> Tally:
        """Returns after that many faults; raises Violation at the first broken promise."""
        self._work.mkdir(parents=True, exist_ok=True)
        while self.tally.count < faults:
            output = Output(self._store, self._root, self._work, self._random, self.tally)
            self.tally.outputs += 1
            try:
                for _ in range(ROUNDS_PER_OUTPUT):
                    if self.tally.count >= faults or not self._one_round(output):
                        break
            except Violation as error:
                raise Violation(error.kind, f"{error}\n" + "\n".join(output.story)) from error
            finally:
                self.tally.checks += output.ledger.checks
            output.remove()
        return self.tally

    def _one_round(self, output: Output) -> bool:
        """A new attempt with one fault; every kind meets every call in turn. False if nothing whole is left."""
        kind = self._kinds[self._round % len(self._kinds)]
        plan = Plan(kind, at=self._round // len(self._kinds) % self._longest)
        # Files that go up at the same time meet the fault in any order; only one at a time can be repeated by seed.
        files.AT_ONCE = 4 if kind not in _OVERTAKEN and self._round % 3 == 0 else 1
        files.SMALLEST_COPY = 1 if self._round % 2 else 1 << 20  # the files here are small
        self._round += 1
        session = Session(output, plan)
        alive = session.run()
        # Slowly, so that the calls at the end of long sessions have their turn too.
        self._longest = max(session.calls, self._longest - 1)
        if plan.fired:
            self.tally.faults[kind] += 1
            self.tally.calls[_shape(plan.fired)] += 1
        output.settle()
        output.ledger.verify()
        if self._random.random() < 0.1:
            output.read_all()
        if alive and self._random.random() < 0.15:
            output.damage()
        return alive


class Output:
    """One output's prefix, what is known of it, and what is on its way to it."""

    def __init__(self, store: ObjectStore, root: Path, work: Path, rng: random.Random, tally: Tally) -> None:
        self.store = store
        self.prefix = f"out-{uuid.uuid4().hex[:12]}"
        self.ledger = Ledger(root / self.prefix)
        self.random = rng
        self.tally = tally
        self.work = work / self.prefix
        self.work.mkdir()
        self.attempt = 0
        self.step = 0
        self.shared = b"words"
        self.alive: Session | None = None
        """A process that has stored all it had, and may go on."""
        self.story: deque[str] = deque(maxlen=120)
        """What happened last, for whoever has to find out."""
        self._late: list[tuple[str, Callable[[], object]]] = []
        self._old_manifests: list[tuple[Path, bytes]] = []

    def later(self, key: str, write: Callable[[], object]) -> None:
        """The write lands at some other time."""
        self._late.append((key, write))

    def wrote(self, key: str) -> None:
        """A write has landed."""
        self.story.append(f"    wrote {key.removeprefix(self.prefix)}")
        name = key.removeprefix(f"{self.prefix}/fences/")
        if name.endswith(".taken"):
            self.ledger.number_taken(int(name.removesuffix(".taken")))
        elif name != key:
            self.ledger.sync()

    def settle(self, share: float = 0.5) -> None:
        """Some of what is on its way lands, in any order."""
        self.random.shuffle(self._late)
        for key, write in [item for item in self._late if self.random.random() < share]:
            self._late.remove((key, write))
            self.story.append("  late:")
            write()
            if key.endswith(MANIFEST):
                self.ledger.landed_late(self.ledger.root / key.removeprefix(f"{self.prefix}/"))
            self.wrote(key)

    def next_content(self) -> Content:
        """What the next checkpoint of node 0 holds: some files as in the last one, some new."""
        self.step += self.random.randint(1, 10)
        if self.random.random() < 0.2:
            self.shared = self.random.randbytes(self.random.randint(1, 3000))
        return {
            "config.json": b'{"same": "in every checkpoint"}',
            "tokenizer/tokenizer.json": self.shared,
            "adapter.safetensors": self.random.randbytes(self.random.randint(1, 3000)),
            "zero/rank_0.safetensors": self.random.randbytes(200),
        }

    def read_all(self) -> None:
        """Somebody restores every checkpoint that counts; damage is told, nothing torn is handed out."""
        for checkpoint in list_checkpoints(self.store, self.prefix):
            target = self.work / f"read-{uuid.uuid4().hex}"
            try:
                restore(self.store, self.prefix, checkpoint.ref, target)
            except CheckpointInvalid:
                continue
            self.ledger.restored((checkpoint.ref.fence, checkpoint.ref.step), read(target))

    def damage(self) -> None:
        """Something that was stored is altered behind the store's back."""
        ledger = self.ledger
        counting = ledger.counting()
        if not counting:
            return
        self._old_manifests += [(path, path.read_bytes()) for path in (ledger.keys(place)[0] for place in counting)]
        kind = self.random.choice(DAMAGE)
        if kind == "removed manifest replayed":
            gone = [(path, data) for path, data in self._old_manifests if not path.exists()]
            if not gone:
                return
            path, data = self.random.choice(gone)
        else:
            path = self.random.choice(ledger.keys(counting[0]))
            data = path.read_bytes()
            if kind == "old manifest replayed":
                path = ledger.keys(counting[0])[0]
                data = self.random.choice(self._old_manifests)[1]
                if data == path.read_bytes():
                    return
            elif kind == "part flipped":
                data = bytes([data[0] ^ 1]) + data[1:]
            elif kind == "part cut":
                data = data[:-1]
        if kind == "part dropped":
            path.unlink()
        elif path.exists():
            path.write_bytes(data)
        else:  # a server keeps more of an object than its bytes
            self.store.put(f"{self.prefix}/{path.relative_to(ledger.root)}", data)
        ledger.damaged.add(path)
        self.story.append(f"{kind}: {path.relative_to(ledger.root)}")
        self.tally.faults[kind] += 1

    def remove(self) -> None:
        """Nothing of it is left."""
        shutil.rmtree(self.ledger.root, ignore_errors=True)
        shutil.rmtree(self.work, ignore_errors=True)


class Session:
    """One process that starts an attempt, saves a few times, prunes, and meets one fault."""

    def __init__(self, output: Output, plan: Plan | None) -> None:
        self.output = output
        self.random = output.random
        self._plan = plan
        self._taken = 0
        self._writer: CheckpointWriter | None = None
        self._store = FaultyStore(output.store, plan, self._overtake, output.later, self._wrote)
        self._max_step: int | None = None
        output.attempt += 1
        self._attempt = output.attempt

    @property
    def calls(self) -> int:
        """How many calls it has made."""
        return self._store.calls

    def run(self) -> bool:
        """False if the output holds checkpoints, none of them whole, as is right."""
        self.output.story.append(f"attempt {self._attempt} starts: {self._plan}")
        try:
            try:
                start = self._start()
            except CheckpointInvalid:
                self.output.ledger.sync()
                self.output.ledger.nothing_whole(self._taken, self._max_step)
                return False
            self._train(start)
            self.output.alive = self
        except (Killed, Superseded, StorageUnavailable, NodeFilesMissing) as error:
            self.output.story.append(f"  attempt {self._attempt} ends: {type(error).__name__} {self._plan}")
        return True

    def _wrote(self, key: str) -> None:
        if key.endswith(".taken"):
            self._taken = int(key.rpartition("/")[2].removesuffix(".taken"))
        self.output.wrote(key)

    def _overtake(self) -> None:
        """The job is started anew while this process still runs, or one that it has overtaken goes on."""
        older = self.output.alive
        if older is not None and self.random.random() < 0.5:
            self.output.alive = None  # it does one thing at a time
            older.go_on()
        else:
            Session(self.output, None).run()
        self.output.settle(0.3)
        self.output.ledger.verify()

    def go_on(self) -> None:
        """Saves once more, whoever owns the output by now."""
        self.output.story.append(f"attempt {self._attempt} goes on: {self._plan}")
        assert self._writer is not None
        try:
            self._save(self._writer, 1)
            self._prune(self._writer, 1, [])
            self.output.alive = self
        except (Killed, Superseded, StorageUnavailable):
            pass

    def _start(self) -> Start:
        output, guards = self.output, None
        if output.step and self.random.random() < 0.1:
            self._max_step = output.step - self.random.randint(0, 15)
            self._max_step = max(self._max_step, 0)
            output.ledger.rollbacks[self._attempt] = self._max_step
            rollback = Rollback(
                reason=RollbackReason.SPIKE,
                onset_step=self._max_step + 1,
                to_step=self._max_step,
                until_step=self._max_step + 20,
                factor=0.5,
            )
            guards = GuardState(rollbacks=(rollback,))
        target = output.work / f"resume-{self._attempt}"
        start = start_attempt(
            self._store,
            output.prefix,
            job_uid="uid-a",
            attempt=self._attempt,
            restore_to=target,
            max_step=self._max_step,
            guards=guards,
        )
        resumed = (start.resumed.ref.fence, start.resumed.ref.step) if start.resumed else None
        chain = [(ref.fence, ref.step) for ref in start.fence.chain]
        output.story.append(f"  attempt {self._attempt} has fence {start.fence.fence}, max {self._max_step}: {chain}")
        output.ledger.started(start.fence, resumed, read(target) if resumed else None)
        return start

    def _train(self, start: Start) -> None:
        output = self.output
        writer = self._writer = CheckpointWriter(self._store, output.prefix, start.fence)
        best: list[int] = []
        keep_last = self.random.randint(1, 3)
        for _ in range(self.random.randint(1, 4)):
            nodes = 2 if self.random.random() < 0.25 else 1
            step = self._save(writer, nodes)
            if self.random.random() < 0.3:
                best = [step]
            if self.random.random() < 0.7:
                self._repeat(partial(self._prune, writer, keep_last, best))

    def _save(self, writer: CheckpointWriter, nodes: int) -> int:
        output = self.output
        content = output.next_content()
        step, fence = output.step, writer.fence.fence
        mine, others, given_up = self._write(content), None, False
        if nodes == 2:
            other = {"zero/rank_1.safetensors": self.random.randbytes(300), "config.json": b"node 1's"}
            others = self._write(other)
            content = other | content
        output.ledger.handed_in[fence, step] = content
        if others is not None:
            uploader = NodeUploader(self._store, output.prefix, fence, 1)
            given_up = self.random.random() < 0.2
            if given_up:
                del output.ledger.handed_in[fence, step]
                self._repeat(lambda: uploader.give_up(step, "its disk is full"))
            else:
                self._repeat(lambda: uploader.upload(step, others))
        try:
            self._repeat(lambda: self._commit(writer, step, mine, nodes))
        except NodeFilesMissing:
            if not given_up:
                raise
        return step

    def _commit(self, writer: CheckpointWriter, step: int, folder: Path, nodes: int) -> None:
        checkpoint = writer.commit(step, folder, world_size=nodes, nodes=nodes, wait_seconds=0)
        self.output.story.append(f"  fence {writer.fence.fence} has committed step {step}")
        self.output.ledger.commit_returned(writer.fence.fence, step, checkpoint.manifest)

    def _prune(self, writer: CheckpointWriter, keep_last: int, best: list[int]) -> None:
        self.output.ledger.prune_called(writer.fence.fence, keep_last, best, writer.fence.guards)
        self.output.story.append(f"  fence {writer.fence.fence} prunes, keep {keep_last} {best}")
        removed = writer.prune(keep_last, best)
        self.output.story.append(f"  fence {writer.fence.fence} has pruned {removed}")

    def _repeat(self, action: Callable[[], None]) -> None:
        """As the agent does when the storage fails; meanwhile something that was late may land."""
        for left in reversed(range(_TRIES)):
            try:
                return action()
            except StorageUnavailable:
                if not left:
                    raise
                self.output.settle(0.3)

    def _write(self, content: Content) -> Path:
        folder = self.output.work / f"saved-{uuid.uuid4().hex}"
        for name, data in content.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return folder


def read(folder: Path) -> Content:
    """All files below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _shape(call: str) -> str:
    """What kind of object a call was about."""
    name, _, key = call.partition(" ")
    rest = key.partition("/")[2]
    if rest.startswith("checkpoints/") and "/step-" in rest:
        if rest.endswith(MANIFEST):
            return f"{name} manifest"
        return f"{name} node list" if "/nodes/" in rest and rest.endswith(".json") else f"{name} part"
    if rest.endswith(".taken"):
        return f"{name} number"
    return f"{name} {rest.split('/')[0]}"
