"""Which prompts and real samples each of several students has: a sample goes to the student of its caption.

The partition is made once, when the prompts are embedded, and kept in the run folder beside what it says of each prompt: a job of one
student and a run that goes on have the very same shares, whatever the text encoder's last bits are by then.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from potstill.engine.common.download import digest
from potstill.engine.common.errors import Damaged, UserError
from potstill.engine.common.kinds import Kind, check, is_list, is_whole, optional
from potstill.engine.common.progress import Bar
from potstill.engine.common.reading import read_json
from potstill.engine.config.schema import Config
from potstill.engine.data.embeddings import is_made
from potstill.engine.data.images import Images
from potstill.engine.data.prompts import Prompts
from potstill.engine.jobs.folder import write_json
from potstill.engine.jobs.inputs import check_inputs, note_inputs
from potstill.engine.jobs.told import Told, open_told, prompt_files, texts_of
from potstill.engine.jobs.workplace import Share
from potstill.engine.methods.msd import OF_PROMPTS, check_kind, part_prompts
from potstill.engine.models.partitions import MOST_STUDENTS, PromptPartition, partition_in
from potstill.engine.nets.conditions import Text
from potstill.engine.training.ranks import Ranks

FILE = "partition.json"
MOST_PARTED, BATCH = 20_000, 32  # different prompts that a partition is made of; all others go by its rule; at a time
MOST_BYTES = 2**28
ADVICE = "restore it, or begin anew with another run_dir="
OTHERWISE = "take fewer students, more prompts or another students.partition"
STUDENTS = Kind(lambda value: is_list(value, lambda k: is_whole(k, 0, MOST_STUDENTS), 1), "a list of students")


class Shares(NamedTuple):
    """The partition, the student of each prompt [N], and that of each real sample by its caption; None where nobody looks at any."""

    partition: PromptPartition
    prompts: np.ndarray
    captions: np.ndarray | None

    def of(self, student: int, whole: Share) -> Share:
        """What one student has of everything."""
        assert whole.told is not None
        prompts = np.flatnonzero(self.prompts == student)
        captions = None if self.captions is None else np.flatnonzero(self.captions == student)
        images = whole.images if whole.images is None or captions is None else whole.images.part(captions)
        return Share(images, whole.told.subset(prompts, captions))


def check_prompts(cfg: Config, images: Images | None, folder: Path) -> None:
    """UserError where prompts cannot be shared out, as far as that is known before they are embedded; where the shares of a run are damaged."""
    if (count := cfg.students.count) == 1:
        return
    check_kind(cfg.students.partition, OF_PROMPTS)
    file, _ = prompt_files(cfg, images, folder)[0]
    if (n := len(set(texts_of(file, images, folder)))) < count:
        raise UserError(f"{count} students want as many different prompts, {file} has {n:,}: {OTHERWISE}")
    if images is not None and cfg.method.needs().data and len(images) < count:
        raise UserError(f"{count} students want as many real samples, {images.name} has {len(images):,}: take fewer students")
    if cfg.students.start and (Path(cfg.students.start).expanduser() / FILE).exists():
        earlier_partition(cfg)
    if (folder / FILE).exists():
        read_shares(folder, count)
        check_inputs(folder, _mark(folder))


def earlier_partition(cfg: Config) -> PromptPartition | None:
    """That of the run whose students go on here. None where they start from the teacher; UserError where its shares are others by kind or number."""
    if not cfg.students.start:
        return None
    start, wanted = Path(cfg.students.start).expanduser(), cfg.students.partition
    if (found := read_shares(start, cfg.students.count).partition).kind != wanted:
        raise UserError(f"students.start: {start} has shares by {found.kind}, wanted some by {wanted}: set students.partition={found.kind}")
    return found


def try_shares(cfg: Config, images: Images | None, folder: Path, device: torch.device, ranks: Ranks) -> None:
    """UserError for a student that would have none, where that is known already: all prompts lie embedded in their caches."""
    if cfg.text.how == "cached" and all(is_made(cache) for _, cache in prompt_files(cfg, images, folder)) and not (folder / FILE).exists():
        share_out(cfg, open_told(cfg, images, folder, device, ranks))


def keep_shares(cfg: Config, told: Told, folder: Path) -> None:
    """Write the shares of a run down, unless that is done. UserError for a student that would have none, or shares other than before."""
    if (folder / FILE).exists():
        return
    partition, prompts, captions = share_out(cfg, told)
    kept = {"partition": partition.described(), "prompts": prompts.tolist(), "captions": None if captions is None else captions.tolist()}
    write_json(folder / FILE, kept)
    check_inputs(folder, _mark(folder))
    note_inputs(folder, _mark(folder))


def read_shares(folder: Path, count: int, told: Told | None = None) -> Shares:
    """Those of a run of so many students. Damaged where they are none, or not of what the nets are told."""
    path = folder / FILE
    found = read_json(path, dict, ADVICE, most=MOST_BYTES)
    partition = partition_in(path, found.get("partition"), ADVICE)
    check(path, found, {"prompts": STUDENTS, "captions": optional(STUDENTS)}, ADVICE)
    prompts, captions = (None if found.get(name) is None else np.array(found[name]) for name in ("prompts", "captions"))
    if not isinstance(partition, PromptPartition) or partition.count != count or prompts is None:
        raise Damaged(f"{path} does not hold the prompts of {count} students: {ADVICE}")
    for some, wanted in ((prompts, told and told.prompts), (captions, told and told.captions)):
        alike = told is None or (None if some is None else len(some)) == (None if wanted is None else len(wanted))
        if not alike or (some is not None and not np.array_equal(np.unique(some), np.arange(count))):
            raise Damaged(f"{path} does not share out the prompts of this run: {ADVICE}")
    return Shares(partition, prompts, captions)


def share_out(cfg: Config, told: Told) -> Shares:
    """Embed all prompts, some of them twice, and part them. UserError for a student without prompts or real samples."""
    count = cfg.students.count
    partition = earlier_partition(cfg)
    if partition is None:
        features = _each(told.prompts, _different(told.prompts), Text.feature)
        partition = part_prompts(cfg.students.partition, features.numpy(), count, cfg.seed)
    prompts, captions = (
        None if one is None else _each(one, np.arange(len(one)), partition.of).numpy() for one in (told.prompts, told.captions)
    )
    assert prompts is not None
    for what, students in (("prompts", prompts), ("real samples, by their captions", captions)):
        if students is not None and (without := np.setdiff1d(np.arange(count), students)).size:
            raise UserError(f"student {without[0]} of {count} has no {what}: {OTHERWISE}")
    return Shares(partition, prompts, captions)


def _different(prompts: Prompts) -> np.ndarray:
    """The first place of every text, at most MOST_PARTED of them, evenly taken."""
    first: dict[str, int] = {}
    for i in range(len(prompts)):
        first.setdefault(prompts.text(i), i)
    places = np.array(list(first.values()))
    n = min(len(places), MOST_PARTED)
    return places[np.arange(n) * len(places) // n]


def _each(prompts: Prompts, ids: np.ndarray, say: Callable[[Text], Tensor]) -> Tensor:
    """`say` of these prompts, on the host."""
    parts = (say(prompts.rows(ids[start : start + BATCH].tolist())).cpu() for start in range(0, len(ids), BATCH))
    return torch.cat(list(Bar("sharing out prompts", len(ids), unit="prompts").over(parts)))


def _mark(folder: Path) -> dict[str, dict[str, str]]:
    return {"partition": {"sha256": digest(folder / FILE)}}
