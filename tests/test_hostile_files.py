"""Files of somebody else, or damaged ones: refused by name in one sentence, before they cost memory and before anything is written."""

import hashlib
import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from potstill.engine import evaluate, export
from potstill.engine.common.errors import Damaged, UserError
from potstill.engine.diffusion.sampling import one_step
from potstill.engine.measure.report import write_report
from potstill.engine.models import weights
from potstill.engine.models.descriptions import built
from potstill.engine.models.generate import write_pairs
from potstill.engine.models.opening import open_models, settings
from potstill.engine.models.partitions import Partition
from potstill.engine.models.router import load_router, student_folder, write_manifest
from potstill.engine.models.student import Student
from potstill.engine.models.weights import file_hash, load_net, read_metadata, read_tensors, save_net, weights_hash
from potstill.engine.nets.edm import all_kwargs, from_kwargs
from potstill.engine.readers.edm_arguments import COUNTS, LISTS, NUMBERS, TEXTS
from potstill.engine.skipping.blocks import blocks_of
from potstill.engine.skipping.freezing import proposed
from potstill.engine.skipping.plan import Plan, check_plan, load_plan, save_plan

KWARGS = {
    "img_resolution": 8, "img_channels": 1, "label_dim": 2, "model_type": "SongUNet", "model_channels": 8, "num_blocks": 1,
    "channel_mult": [1, 1], "attn_resolutions": [4],
}  # fmt: skip
NAN, INF = float("nan"), float("inf")
BIAS = "model.map_layer0.bias"
ABOUT = {"method": "dmd", "data": "digits", "sampler": one_step(2.5).to_dict(), "kimg": 1.0, "seconds": 2.0}


def net_of(seed=0, precond="EDMPrecond", **kwargs):
    torch.manual_seed(seed)
    return from_kwargs(precond, **KWARGS | kwargs).eval()


@pytest.fixture
def file(tmp_path):
    save_net(tmp_path / "student.safetensors", net_of(), **ABOUT)
    return tmp_path / "student.safetensors"


def rewritten(path, tensors=None, **metadata):
    """The same file as another program would write it: with other tensors or metadata, and without a checksum."""
    own, meta = read_tensors(path)
    text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (meta | metadata).items()}
    save_file(own | (tensors or {}), path, metadata=text)
    return path


def refusal(call, *words, kind=UserError):
    with pytest.raises(kind) as caught:
        call()
    sentence = str(caught.value)
    assert sentence.isprintable() and len(sentence) < 700
    assert all(word in sentence for word in words), sentence
    return sentence


# What a file says about its net


@pytest.mark.parametrize(("name", "value"), [
    ("num_blocks", 10**9), ("channel_mult", [1] * 1000), ("channel_mult", [[1]]), ("img_resolution", 2**40), ("label_dim", 2**31),
    ("img_channels", "1"), ("img_channels", -1), ("model_channels", True), ("dropout", NAN), ("dropout", 5), ("sigma_data", 0), ("M", 10**9),
    ("resample_filter", [1, 2, 1]), ("model_type", 3), ("attn_resolutions", {}), ("evil", 1), ("label_dropout", 10**400),
])  # fmt: skip
def test_an_absurd_net_is_refused_by_its_argument(file, name, value):
    refusal(lambda: load_net(rewritten(file, kwargs=KWARGS | {name: value})), str(file), name, kind=Damaged)


def test_every_argument_of_a_net_has_bounds():
    bounded = {*COUNTS, *LISTS, *NUMBERS, *TEXTS, "use_fp16", "step_condition"}
    for model in ("SongUNet", "DhariwalUNet"):
        for precond in ("EDMPrecond", "VPPrecond", "iDDPMPrecond"):
            assert all_kwargs(precond, KWARGS | {"model_type": model}).keys() <= bounded


@pytest.mark.parametrize("more", [{"model_channels": 9}, {"model_type": "DhariwalUNet", "model_channels": 224}], ids=str)
def test_a_net_that_no_image_passes_is_not_built(file, more):
    refusal(lambda: load_net(rewritten(file, kwargs=KWARGS | more)), "describes a net that cannot be built", kind=Damaged)


def test_a_small_file_cannot_ask_for_a_large_net(file, monkeypatch):
    """Its sizes are compared while the net is a plan: nothing of gigabytes is ever built."""
    devices = []

    def watched(meta):
        devices.append(torch.get_default_device().type)
        return built(meta)

    monkeypatch.setattr(weights, "built", watched)
    load_net(file)
    assert devices == ["meta", "cpu"]
    rewritten(file, kwargs=KWARGS | {"model_channels": 4096, "channel_mult": [8, 8]})  # 40 GB
    refusal(lambda: load_net(file), "is of another architecture", "shapes differ")
    assert devices == ["meta", "cpu", "meta"]


@pytest.mark.parametrize("precond", ["EDMPrecond", "iDDPMPrecond"])
def test_a_net_comes_back_bit_for_bit_and_takes_the_same_random_numbers(tmp_path, precond):
    net = net_of(3, precond, resample_filter=[1, 3, 3, 1], embedding_type="fourier")
    save_net(tmp_path / "a.safetensors", net)
    torch.manual_seed(5)
    from_kwargs(precond, **net.kwargs)
    after = torch.rand(3)
    torch.manual_seed(5)
    again, _ = load_net(tmp_path / "a.safetensors")
    assert torch.rand(3).equal(after)
    assert weights_hash(again) == weights_hash(net) and again.kwargs == net.kwargs and again.scheme == net.scheme
    assert all(tensor.device.type == "cpu" for tensor in again.state_dict().values())


@pytest.mark.parametrize(("change", "words"), [
    (lambda t: t.fill_(NAN), "not finite in"), (lambda t: t.fill_(-INF), "not finite in"), (lambda t: t.double() + 1e300, "not finite in"),
    (lambda t: t.long(), "as I64, wanted one of float64"), (lambda t: t.to(torch.complex64), "wanted one of float64"), (lambda t: t > 0, "as BOOL"),
])  # fmt: skip
def test_tensors_that_are_no_weights_are_refused_by_name(file, change, words):
    tensors = read_tensors(file)[0]
    refusal(lambda: load_net(rewritten(file, {BIAS: change(tensors[BIAS].clone())})), BIAS, words, kind=Damaged)


def test_halves_and_doubles_are_weights(file):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        rewritten(file, {BIAS: read_tensors(file)[0][BIAS].to(dtype)})
        assert load_net(file)[0].state_dict()[BIAS].dtype == torch.float32


@pytest.mark.parametrize("levels", [[], [NAN], [INF], ["a"], [-1.0], [0.0], [[1.0]], 5, None, [True], [10**400], "80", {}], ids=str)
def test_noise_levels_that_are_none_are_refused(file, levels):
    rewritten(file, sampler={"solver": "one_step", "sigmas": levels})
    refusal(lambda: open_models(file), "sigmas wants one noise level")


@pytest.mark.parametrize(("change", "words"), [
    ({"sigmas": [1.0, 2.0]}, "none above the one before"), ({"afs": 1}, "afs wants true or false"), ({"rho": INF}, "rho wants"),
    ({"rho": "7"}, "rho wants"), ({"step_condition": 2.5}, "step_condition wants"), ({"churn": [1, 2]}, "churn wants"),
    ({"churn": ["a", 0, 1, 1]}, "churn wants"), ({"churn": [INF, 0, 1, 1]}, "churn wants"), ({"solver": ["heun"]}, "solver wants"),
    ({"evil": 1}, "evil"), ({"sigmas": list(range(20_000, 0, -1))}, "at most 10,000"),
])  # fmt: skip
def test_ways_of_sampling_that_are_none_are_refused(file, change, words):
    rewritten(file, sampler={"solver": "euler", "sigmas": [80.0, 1.0, 0.0]} | change)
    refusal(lambda: open_models(file), words)


@pytest.mark.parametrize(("name", "value"), [
    ("kimg", "abc"), ("kimg", NAN), ("seconds", None), ("student", True), ("student", -1), ("sampler", [1]), ("kwargs", "x"), ("teacher", "x"),
    ("chosen_by", {}), ("method", "a\nlicense: mit"), ("sampler", "[" * 100_000), ("kimg", "9" * 5000),
])  # fmt: skip
def test_metadata_of_another_kind_are_refused_by_name(file, name, value):
    refusal(lambda: read_metadata(rewritten(file, **{name: value})), f"has {name} = ", kind=Damaged)


def test_texts_that_look_like_numbers_stay_texts(file):
    """A partition's hash of 16 digits, one digit after the other: as a number it would be another student's."""
    for text in ("1234567890123456", "12e4567890123456", "null", "true"):
        save_net(file, net_of(), partition=text, data=text, sha256=text)
        assert {read_metadata(file)[name] for name in ("partition", "data", "sha256")} == {text}


# Headers and checksums


def raw(header, data=b"\0\0\0\0"):
    text = header.encode()
    return struct.pack("<Q", len(text)) + text + data


ONE = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize("content", [
    raw(f'{{"a":{ONE},"b":{ONE}}}'), raw(f'{{"a":{ONE}}}', b"\0" * 40), raw(f'{{"__metadata__":{{"x":1}},"a":{ONE}}}'),
    raw(f'{{"__metadata__":{{"x":"1"}},"__metadata__":{{"x":"2"}},"a":{ONE}}}'), raw("{" + " " * 2**24 + f'"a":{ONE}}}'),
    struct.pack("<Q", 2**62) + b"{}", raw("[" * 10_000), b"", bytes(100),
], ids=["overlap", "more bytes", "a number", "twice", "huge", "claims", "deep", "empty", "zeros"])  # fmt: skip
def test_headers_that_contradict_themselves_are_damage(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    for read in (read_tensors, read_metadata, load_net, file_hash):
        refusal(lambda read=read: read(path), f"{path} is not a complete safetensors file", kind=Damaged)


def test_names_of_tensors_cannot_write_on_a_terminal(file):
    refusal(lambda: load_net(rewritten(file, {"a\n\x1b[31m": torch.zeros(1)})), "another architecture")


def checksum_by_hand(path):
    """From the bytes of the file, without a library that reads it."""
    content = path.read_bytes()
    n = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + n]), content[8 + n :]
    metadata, tensors = header.pop("__metadata__"), hashlib.sha256()
    promised = metadata.pop("checksum")
    for name, one in sorted(header.items()):
        dtype = {"F32": "float32", "U8": "uint8", "I64": "int64"}[one["dtype"]]
        tensors.update(f"{name} {dtype} {one['shape']}\n".encode() + data[slice(*one["data_offsets"])])
    return promised, hashlib.sha256(f"{json.dumps(metadata, sort_keys=True)}\n{tensors.hexdigest()}".encode()).hexdigest()


def test_every_bit_of_a_file_of_ours_is_under_its_checksum(file, tmp_path):
    write_pairs(tmp_path / "pairs.safetensors", net_of(), one_step(2.5), np.array([0, 1]), 2, 2, "cpu")
    for path in (file, tmp_path / "pairs.safetensors"):
        promised, found = checksum_by_hand(path)
        assert promised == found
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        for at in np.linspace(start, len(content) - 1, 9).astype(int):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            refusal(lambda path=path: read_tensors(path), f"{path} is damaged (its checksum differs): copy it again", kind=Damaged)
        path.write_bytes(content)
        assert "checksum" not in read_metadata(path) and file_hash(path)
    file.write_bytes(file.read_bytes().replace(b"[2.5]", b"[7.5]"))  # a number of the metadata
    refusal(lambda: load_net(file), "checksum differs", kind=Damaged)


def test_a_checksum_whose_name_is_damaged_is_missed(file, tmp_path):
    """Each bit of the name: without it the file would pass for one of an earlier version, damaged as it is."""
    data = file.read_bytes()
    start = data.index(b'"checksum"') + 1
    for at in range(start, start + 8):
        for bit in range(8):
            path = tmp_path / "flipped.safetensors"
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
            for read in (load_net, read_tensors):
                with pytest.raises(Damaged):
                    read(path)


def test_files_without_a_checksum_are_read_and_one_that_is_saved_again_has_its_own(file, tmp_path):
    rewritten(file)
    assert b"checksum" not in file.read_bytes()[:4000]
    Student.from_pretrained(file).save_pretrained(tmp_path / "hub")
    promised, found = checksum_by_hand(tmp_path / "hub/model.safetensors")
    assert promised == found
    assert "checksum" not in json.loads((tmp_path / "hub/config.json").read_text())


# Manifests


@pytest.fixture
def manifest(tmp_path):
    partition = Partition("block", (0, 1))
    for k in range(2):
        student_folder(tmp_path / "run", k).mkdir(parents=True)
        save_net(tmp_path / f"run/student-{k}/student.safetensors", net_of(k), partition=partition.hash, student=k, **ABOUT)
    write_manifest(tmp_path / "run", partition)
    return tmp_path / "run/manifest.json"


def changed(path, change):
    text = json.loads(path.read_text())
    change(text)
    path.write_text(json.dumps(text))
    return path


@pytest.mark.parametrize("name", [
    "../student-0/student.safetensors", "/etc/passwd", "student-1/student.safetensors", "..\\student.safetensors", "C:student.safetensors",
    "student-0/../student-0/student.safetensors", "student-0", "",
])  # fmt: skip
def test_a_manifest_names_its_own_students_and_nothing_else(manifest, name, tmp_path):
    changed(manifest, lambda text: text["students"][0].update(file=name))
    before = sorted(tmp_path.rglob("*"))
    words = "for student 0, wanted student-0/student.safetensors"
    refusal(lambda: load_router(manifest), words, kind=Damaged)
    refusal(lambda: export.main([str(manifest), "--to", "hub", "--out", str(tmp_path / "out")]), words)
    assert sorted(tmp_path.rglob("*")) == before


def test_links_stay_within_a_manifests_folder(manifest, tmp_path):
    """As the hub's cache lays a repository out they may lead to where the manifest itself really is."""
    snapshot, blobs = tmp_path / "snapshots/abc", tmp_path / "blobs"
    blobs.mkdir()
    for name in ("manifest.json", "student-0/student.safetensors", "student-1/student.safetensors"):
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        blob = blobs / name.replace("/", "-")
        blob.write_bytes((manifest.parent / name).read_bytes())
        (snapshot / name).symlink_to(blob)
    load_router(snapshot / "manifest.json")
    student = manifest.parent / "student-1/student.safetensors"
    student.rename(tmp_path / "elsewhere.safetensors")
    student.symlink_to(tmp_path / "elsewhere.safetensors")
    refusal(lambda: load_router(manifest), "is a link out of the folder of its manifest")


@pytest.mark.parametrize(("change", "words"), [
    (lambda t: t.pop("students"), "lacks"), (lambda t: t.update(students=[]), "lacks"), (lambda t: t["students"][0].pop("sha256"), "lacks"),
    (lambda t: t["partition"].pop("hash"), "lacks"), (lambda t: t["partition"].update(student_of=[0, 2]), "partition.student_of"),
    (lambda t: t["partition"].update(student_of=[0, True]), "partition.student_of"), (lambda t: t["partition"].update(student_of=[]), "student_of"),
    (lambda t: t["partition"].update(student_of=[0, 10**9]), "student_of"), (lambda t: t["partition"].update(kind=None), "partition.kind"),
    (lambda t: t["partition"].update(student_of=[1, 0]), "contradicts itself"),
])  # fmt: skip
def test_damaged_manifests_are_refused_in_one_sentence(manifest, change, words):
    refusal(lambda: load_router(changed(manifest, change)), str(manifest), words, kind=Damaged)


def test_students_of_other_sizes_do_not_mix(manifest, tmp_path):
    partition = Partition("block", (0, 1))
    file = manifest.parent / "student-1/student.safetensors"
    save_net(file, net_of(img_resolution=16), partition=partition.hash, student=1, **ABOUT)
    write_manifest(manifest.parent, partition)
    refusal(lambda: load_router(manifest), "they do not mix", kind=Damaged)
    for k in range(2):
        save_net(manifest.parent / f"student-{k}/student.safetensors", net_of(label_dim=3), partition=partition.hash, student=k, **ABOUT)
    write_manifest(manifest.parent, partition)
    refusal(lambda: open_models(manifest), "shares out 2 classes, its students know 3")


# Plans, summaries, settings


@pytest.fixture
def plan_file(tmp_path):
    net = net_of()
    order = list(blocks_of(net.model))[:4]
    affine = {name: {"a": [[0.9] * 8] * 2, "b": [[0.0] * 8] * 2} for name in order[:2]}
    save_plan(tmp_path / "plan.json", Plan(weights_hash(net), 8, [0.002, 1.0, 80.0], order, [2, 1], 0.02, affine))
    return tmp_path / "plan.json"


FIRST = next(iter(blocks_of(net_of().model)))


@pytest.mark.parametrize(("change", "words"), [
    (lambda p: p.pop("edges"), "'edges' is missing"), (lambda p: p.update(evil=1), "'evil' is not known"), (lambda p: p.update(format=[]), "format"),
    (lambda p: p.update(teacher=None), "teacher"), (lambda p: p.update(resolution="8"), "resolution"), (lambda p: p.update(resolution=True), "resolution"),
    (lambda p: p.update(edges=[0.1, NAN, 80]), "edges"), (lambda p: p.update(edges=[0.1, INF]), "edges"), (lambda p: p.update(edges=[3, 2, 1]), "edges"),
    (lambda p: p.update(edges=["a", "b", "c"]), "edges"), (lambda p: p.update(edges=[1.0, 2.0]), "contradicts itself"),
    (lambda p: p.update(order=p["order"][:1] * 4), "contradicts itself"), (lambda p: p.update(order=[1, 2]), "order"),
    (lambda p: p.update(prefix=[True, 1]), "prefix"), (lambda p: p.update(prefix=[1.5, 1]), "prefix"), (lambda p: p.update(prefix=[]), "prefix"),
    (lambda p: p.update(prefix=[9, 1]), "contradicts itself"), (lambda p: p.update(budget=NAN), "budget"), (lambda p: p.update(budget="x"), "budget"),
    (lambda p: p.update(affine=[]), "affine"), (lambda p: p["affine"].update(evil={}), "contradicts itself"), (lambda p: p.update(report=[]), "report"),
    (lambda p: p["affine"][FIRST].update(a=[[NAN] * 8] * 2), f"affine of '{FIRST}'"), (lambda p: p["affine"][FIRST].update(b=[[INF] * 8] * 2), FIRST),
    (lambda p: p["affine"][FIRST].update(a=[[1.0] * 7, [1.0] * 8]), FIRST), (lambda p: p["affine"][FIRST].update(a=[[1.0] * 8]), FIRST),
    (lambda p: p["affine"][FIRST].pop("a"), FIRST), (lambda p: p["affine"][FIRST].update(a=[[], []]), FIRST),
    (lambda p: p.update(prefix=[1, 1]), "its checksum differs"), (lambda p: p.update(budget=0.01), "its checksum differs"),
])  # fmt: skip
def test_damaged_plans_are_refused_by_name(plan_file, change, words):
    refusal(lambda: load_plan(changed(plan_file, change)), str(plan_file), words, "make it again with potstill probe", kind=Damaged)


def test_plans_of_an_earlier_version_have_no_checksum(plan_file):
    plan = load_plan(plan_file)
    assert load_plan(changed(plan_file, lambda p: p.pop("checksum"))) == plan
    plan.affine[FIRST] = {"a": [[1.0] * 4] * 2, "b": [[0.0] * 4] * 2}
    refusal(lambda: check_plan(plan, net_of(), "plan.json"), f"calibrates {FIRST} with 4 channels")
    for report in ({"freeze": 1}, {"freeze": {"levels": {"1": []}}}, {"freeze": {"levels": {"1": {"frozen": [1]}}}}):
        plan.report = report
        refusal(lambda: proposed(plan, 1), "method.freeze_plan wants")


@pytest.mark.parametrize(("summary", "words"), [
    ([], "holds a list"), ({"student": []}, "student"), ({"student": {"fd": NAN}}, "student.fd"), ({"student": {"n": "x"}}, "student.n"),
    ({"teacher": {"nfe": True}}, "teacher.nfe"), ({"seconds": {"student": None}}, "seconds.student"), ({"versions": {"torch": 2}}, "versions.torch"),
    ({"images_seen": {"student": "many"}}, "images_seen.student"), ({"floor": {"fd": "low"}}, "floor.fd"), ({"device": 3}, "device"),
])  # fmt: skip
def test_a_damaged_summary_ends_an_export_in_a_sentence(file, tmp_path, summary, words, capsys):
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    refusal(
        lambda: export.main([str(tmp_path), "--to", "hub", "--out", str(tmp_path / "out")]),
        "summary.json",
        words,
        "to renew it",
        kind=Damaged,
    )
    write_report(tmp_path)
    assert not (tmp_path / "out").exists()


def test_what_is_measured_is_told_beside_a_damaged_summary(file, tmp_path, capsys):
    (tmp_path / "summary.json").write_bytes(b"\xff\xfe{")
    evaluate.main([str(file), "--data", "synthetic:8x1x2", "--n", "4"])
    out, err = capsys.readouterr()
    assert "student" in json.loads(out) and "note: the teacher's score is not beside the student's: " in err
    write_report(tmp_path)


@pytest.mark.parametrize(("text", "words"), [
    ("teacher: [1]", "teacher = [1]"), ("eval: {n: many}", "eval.n = 'many'"), ("data: {path: 3}", "data.path = 3"), ("eval: {seed: .nan}", "eval.seed"),
    ("[" * 500, "YAML"), ("a: [b", "YAML"),
])  # fmt: skip
def test_settings_of_another_kind_are_refused(tmp_path, text, words):
    (tmp_path / "config.yaml").write_text(text)
    refusal(lambda: settings(tmp_path), "config.yaml", words, kind=Damaged)
