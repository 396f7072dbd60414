"""Weight files: damage is named, writing is all or nothing, the three PuLID layouts hold the same tensors."""

import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch

from idcore.errors import InputError, WeightsError
from idcore.systems.pulid import PuLID, PuLIDConfig
from idcore.systems.pulid_encoders import EncoderConfig
from idcore.weights import (
    convert,
    convert_pickle,
    describe,
    fingerprint,
    read_pulid,
    read_safetensors,
    require_keys,
    to_layout,
    write_safetensors,
)

TINY = dict(id_dim=12, vit_dim=10, width=16, output_dim=14, queries=6, heads=4)
LAYERS = ((1, 8), (3, 8), (5, 12))


def tiny(version="v1"):
    torch.manual_seed(5)
    return PuLID(PuLIDConfig(EncoderConfig(version, **TINY), LAYERS)).eval()


def as_published(system, layout, path):
    """A file as others publish it: bare keys, none of our metadata."""
    state = {to_layout(k, layout): v for k, v in system.state_dict().items()}
    return write_safetensors(path, state, {"format": "pt"})


def test_write_and_read_back_bit_by_bit(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5).bfloat16(), "c": torch.arange(4), "empty": torch.zeros(0, 3)}
    write_safetensors(tmp_path / "x.safetensors", tensors, {"note": "é"})
    back, metadata = read_safetensors(tmp_path / "x.safetensors")
    assert metadata == {"note": "é"} and back.keys() == tensors.keys()
    assert all(torch.equal(back[k], t) and back[k].dtype == t.dtype for k, t in tensors.items())
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_shared_and_strided_tensors_are_written_each_by_itself(tmp_path):
    base = torch.randn(4, 6)
    write_safetensors(tmp_path / "x.safetensors", {"a": base, "b": base, "c": base.T, "d": base[1:3]})
    back, _ = read_safetensors(tmp_path / "x.safetensors")
    assert torch.equal(back["b"], base) and torch.equal(back["c"], base.T) and torch.equal(back["d"], base[1:3])


def good_bytes(tmp_path):
    path = write_safetensors(tmp_path / "good.safetensors", {"a": torch.randn(100), "b": torch.randn(50)})
    return path.read_bytes()


@pytest.mark.parametrize("make,text", [
    (lambda b: b"", "an empty file"),
    (lambda b: b[:-200], r"truncated or damaged: its header speaks of \d+ bytes, the file has \d+; fetch it again"),
    (lambda b: b[:40], r"truncated or no safetensors file: its header should take \d+ bytes, the file has 40"),
    (lambda b: b + b"more", "truncated or damaged"),
    (lambda b: b[:8] + b"{" + b"\xff" * (len(b) - 9), "header of .* is damaged"),
    (lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer.*git lfs pull"),
    (lambda b: b"<!DOCTYPE html><html>not found</html>", "an HTML page"),
    (lambda b: b"\x93NUMPY" + b[6:], "of an unknown kind"),
    (lambda b: pickle.dumps({"a": 1}), "torch pickle, which can carry code; it is not opened.*convert_pickle"),
])  # fmt: skip
def test_damaged_and_foreign_files_are_named(tmp_path, make, text):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(make(good_bytes(tmp_path)))
    with pytest.raises(WeightsError, match=text):
        read_safetensors(path)


def test_overlapping_header_is_refused(tmp_path):
    header = (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[3],"data_offsets":[4,16]}}'
    )
    path = tmp_path / "overlap.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        read_safetensors(path)


@pytest.mark.parametrize("length", [0x280, 0x0280 + 0x10000])
def test_header_lengths_that_look_like_a_pickle_are_still_safetensors(tmp_path, length):
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(length)
    path = tmp_path / "odd.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + header + bytes(4))
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert torch.equal(read_safetensors(path)[0]["a"], torch.zeros(1))


def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(WeightsError, match="nothing.safetensors does not exist"):
        read_safetensors(tmp_path / "nothing.safetensors")
    with pytest.raises(WeightsError, match="is a folder"):
        describe(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_and_named(tmp_path, value):
    bad = torch.ones(3)
    bad[1] = value
    path = write_safetensors(tmp_path / "x.safetensors", {"fine": torch.ones(2), "broken": bad, "half": bad.half()})
    with pytest.raises(WeightsError, match="2 of 3 tensors hold NaN or infinity: broken, half"):
        read_safetensors(path)


def test_keys_are_named_first_few_and_count():
    wanted = {f"k{i}": (2, 3) for i in range(12)}
    found = {f"k{i}": torch.zeros(2, 3) for i in range(4)} | {"k0": torch.zeros(3, 2), "odd": torch.zeros(1)}
    with pytest.raises(WeightsError) as e:
        require_keys(found, wanted, "weights x")
    text = str(e.value)
    assert "weights x: wanted 12 tensors, got 5" in text and "8 missing: k4, k5, k6, k7, k8 and 3 more" in text
    assert "1 unexpected: odd" in text and "1 of the wrong shape: k0 (wanted [2, 3], got [3, 2])" in text
    require_keys({k: torch.zeros(s) for k, s in wanted.items()}, wanted, "fine")


# -- all or nothing ------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_file_and_no_rubbish(tmp_path):
    """A process that may write at most 20 KB per file: the system refuses in the middle, as a full disk does."""
    target = write_safetensors(tmp_path / "w.safetensors", {"a": torch.ones(4)})
    before = target.read_bytes()
    code = f"""
    import resource, signal, torch
    from idcore.weights import write_safetensors
    from idcore.errors import WeightsError
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        write_safetensors({str(target)!r}, {{"a": torch.ones(100_000)}})
    except WeightsError as e:
        print(e)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert "could not write" in done.stdout and "wanted a writable folder with 0.4 MiB free" in done.stdout, done
    assert "Nothing that stood at this path was touched" in done.stdout
    assert target.read_bytes() == before and os.listdir(tmp_path) == ["w.safetensors"]


def test_a_folder_that_is_missing_or_read_only_is_named(tmp_path):
    with pytest.raises(WeightsError, match="could not write .*does not exist"):
        write_safetensors(tmp_path / "no" / "w.safetensors", {"a": torch.ones(1)})
    if os.geteuid() == 0:
        pytest.skip("root may write to a read-only folder")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(WeightsError, match="could not write .*wanted a writable folder"):
            write_safetensors(tmp_path / "w.safetensors", {"a": torch.ones(1)})
    finally:
        tmp_path.chmod(0o700)


def test_a_failure_of_the_rename_leaves_the_old_file(tmp_path, monkeypatch):
    target = write_safetensors(tmp_path / "w.safetensors", {"a": torch.ones(4)})
    before = target.read_bytes()

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(WeightsError, match="Read-only file system"):
        write_safetensors(target, {"a": torch.zeros(4)})
    assert target.read_bytes() == before and os.listdir(tmp_path) == ["w.safetensors"]


# -- PuLID layouts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["v1", "v1.1"])
@pytest.mark.parametrize("layout", ["pulid", "community"])
def test_safetensors_layouts_round_trip(tmp_path, version, layout):
    system = tiny(version)
    path = as_published(system, layout, tmp_path / "p.safetensors")
    keys = set(read_safetensors(path)[0])
    assert ("ip_adapter.3.to_k_ip.weight" in keys) == (layout == "community")
    assert any(k.startswith("image_proj.") for k in keys) == (layout == "community")
    info = describe(path)
    assert (info.layout, info.version) == (layout, version) and info.tensors == len(system.state_dict())
    assert info.parameters == sum(p.numel() for p in system.parameters()) and info.dtypes == {"F32": info.tensors}
    loaded = PuLID.from_weights(path, config=system.config)
    assert all(torch.equal(v, system.state_dict()[k]) for k, v in loaded.state_dict().items())
    loaded.save(tmp_path / "again.safetensors", layout="community" if layout == "pulid" else "pulid")
    again = PuLID.from_weights(tmp_path / "again.safetensors")  # sizes are in the metadata
    assert again.config == system.config and again.version == version
    assert all(torch.equal(v, system.state_dict()[k]) for k, v in again.state_dict().items())
    assert again.weights_hash() == loaded.weights_hash() == system.weights_hash()


@pytest.mark.parametrize("nested", [False, True])
def test_v1_pickle_is_refused_until_it_is_converted(tmp_path, nested):
    system = tiny("v1")
    state = dict(system.state_dict())
    if nested:  # the community's layout as the IP-Adapter scripts pickle it: two dictionaries
        flat = {to_layout(k, "community"): v for k, v in state.items()}
        state = {
            top: {k.removeprefix(f"{top}."): v for k, v in flat.items() if k.startswith(f"{top}.")}
            for top in ("image_proj", "ip_adapter")
        }
    torch.save(state, tmp_path / "pulid_v1.bin")
    with pytest.raises(WeightsError, match=r"torch pickle.*not opened here.*convert_pickle\('.*pulid_v1.bin'"):
        PuLID.from_weights(tmp_path / "pulid_v1.bin", config=system.config)
    assert describe(tmp_path / "pulid_v1.bin").container == "torch pickle"
    info = convert_pickle(tmp_path / "pulid_v1.bin", tmp_path / "pulid_v1.safetensors")
    assert (info.layout, info.version) == ("community" if nested else "pulid", "v1")
    loaded = PuLID.from_weights(tmp_path / "pulid_v1.safetensors", config=system.config)
    assert all(torch.equal(v, system.state_dict()[k]) for k, v in loaded.state_dict().items())


class Payload:
    def __reduce__(self):
        return os.mkdir, (os.environ["IDCORE_TEST_PAYLOAD"],)


def test_code_in_a_pickle_does_not_run(tmp_path, monkeypatch):
    mark = tmp_path / "ran"
    monkeypatch.setenv("IDCORE_TEST_PAYLOAD", str(mark))
    torch.save({"a": torch.ones(1), "b": Payload()}, tmp_path / "evil.bin")
    with pytest.raises(WeightsError, match="no code from it was run"):
        convert_pickle(tmp_path / "evil.bin", tmp_path / "out.safetensors")
    assert not mark.exists() and not (tmp_path / "out.safetensors").exists()


def test_conversion_names_what_it_cannot_use(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    with pytest.raises(WeightsError, match="holds no tensors by name"):
        convert_pickle(tmp_path / "empty.pt", tmp_path / "out.safetensors")
    torch.save({"state_dict": {"module.a": torch.ones(2), "module.b": torch.zeros(1)}, "epoch": 3}, tmp_path / "ddp.pt")
    assert convert_pickle(tmp_path / "ddp.pt", tmp_path / "out.safetensors").tensors == 2
    assert set(read_safetensors(tmp_path / "out.safetensors")[0]) == {"a", "b"}
    torch.save({"a": torch.ones(2), "epoch": 3}, tmp_path / "mixed.pt")
    assert "1 entries that are no tensors: epoch" in convert_pickle(tmp_path / "mixed.pt", tmp_path / "o").note
    torch.save({"a": torch.full((2,), float("nan"))}, tmp_path / "nan.pt")
    with pytest.raises(WeightsError, match="NaN or infinity: a"):
        convert_pickle(tmp_path / "nan.pt", tmp_path / "nan.safetensors")
    whole = (tmp_path / "ddp.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="damaged or holds other objects"):
        convert_pickle(tmp_path / "cut.pt", tmp_path / "out2.safetensors")
    with pytest.raises(WeightsError, match="wants a torch pickle.*is safetensors"):
        convert_pickle(tmp_path / "out.safetensors", tmp_path / "out3.safetensors")


@pytest.mark.parametrize("change,text", [
    (lambda s: s.pop("id_adapter_attn_layers.3.id_to_v.weight"), "1 missing: id_adapter_attn_layers.3.id_to_v.weight"),
    (lambda s: s.update({"id_adapter.more": torch.zeros(1)}), r"1 unexpected: id_adapter\.more"),
    (lambda s: s.update({"id_adapter.body.0.weight": torch.zeros(16, 11)}),
     r"1 of the wrong shape: id_adapter\.body\.0\.weight \(wanted \[16, 12\], got \[16, 11\]\)"),
    (lambda s: s.update({"ip_adapter.3.to_k_ip.weight": torch.zeros(8, 14)}), "mixes two layouts"),
    (lambda s: s.update({"id_adapter.body.0.bias": torch.full((16,), float("nan"))}), "NaN or infinity"),
])  # fmt: skip
def test_pulid_files_that_do_not_fit_are_named(tmp_path, change, text):
    system = tiny("v1")
    state = dict(system.state_dict())
    change(state)
    with pytest.raises(WeightsError, match=text):
        PuLID.from_weights(write_safetensors(tmp_path / "p.safetensors", state), config=system.config)


def test_tiny_file_without_sizes_is_measured_against_the_published_ones(tmp_path):
    path = as_published(tiny("v1"), "pulid", tmp_path / "p.safetensors")
    with pytest.raises(WeightsError, match="wanted 250 tensors, got 116; 134 missing: .* and 129 more; 116 of "):
        PuLID.from_weights(path)


def test_wrong_version_flux_and_foreign_files_are_named(tmp_path):
    path = as_published(tiny("v1.1"), "pulid", tmp_path / "p.safetensors")
    with pytest.raises(WeightsError, match="wanted PuLID v1, its encoder is v1.1"):
        PuLID.from_weights(path, "v1")
    with pytest.raises(InputError, match="version must be 'auto', 'v1' or 'v1.1', got 'v2'"):
        PuLID.from_weights(path, "v2")
    flux = {"pulid_encoder.latents": torch.zeros(1), "pulid_ca.0.to_q.weight": torch.zeros(1)}
    with pytest.raises(WeightsError, match="PuLID-FLUX file"):
        read_pulid(write_safetensors(tmp_path / "f.safetensors", flux))
    with pytest.raises(WeightsError, match="is no PuLID file .layout unknown, 1 tensors."):
        read_pulid(write_safetensors(tmp_path / "o.safetensors", {"a": torch.zeros(1)}))


@pytest.mark.parametrize("layout", ["pulid", "community"])
def test_convert_rewrites_any_layout(tmp_path, layout):
    system = tiny("v1")
    torch.save(system.state_dict(), tmp_path / "v1.bin")
    with pytest.raises(WeightsError, match="torch pickle"):
        convert(tmp_path / "v1.bin", tmp_path / "a.safetensors")
    info = convert(tmp_path / "v1.bin", tmp_path / "a.safetensors", layout=layout, unpickle=True)
    assert (info.layout, info.version, info.tensors) == (layout, "v1", 116)
    other = "pulid" if layout == "community" else "community"
    assert convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", layout=other).layout == other
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b.safetensors", "v1.bin"]
    for name in "ab":
        back = PuLID.from_weights(tmp_path / f"{name}.safetensors", config=system.config).state_dict()
        assert all(torch.equal(v, system.state_dict()[k]) for k, v in back.items())
    with pytest.raises(InputError, match="layout must be 'pulid' or 'community', got 'comfy'"):
        convert(tmp_path / "a.safetensors", tmp_path / "c.safetensors", layout="comfy")


def test_convert_takes_the_vision_tower_and_the_parsing_network_too(tmp_path):
    torch.save({"cp.resnet.conv1.weight": torch.ones(2)}, tmp_path / "parsing.pth")
    info = convert(tmp_path / "parsing.pth", tmp_path / "parsing.safetensors", unpickle=True)
    assert info.layout == "bisenet" and info.path == tmp_path / "parsing.safetensors" and info.path.exists()
    tower = {"visual.blocks.0.attn.inner_attn_ln.weight": torch.ones(2), "text.x": torch.ones(1)}
    torch.save(tower, tmp_path / "eva.pt")
    info = convert(tmp_path / "eva.pt", tmp_path / "eva.safetensors", unpickle=True)
    assert info.layout == "eva_clip" and info.tensors == 1 and "left out 1 tensors" in info.note
    torch.save({"a": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match="is no PuLID file .layout unknown, 1 tensors."):
        convert(tmp_path / "other.pt", tmp_path / "other.safetensors", unpickle=True)
    assert not [f for f in os.listdir(tmp_path) if f.startswith((".", "other.s"))]


def test_fingerprint_is_of_names_shapes_and_bytes():
    a, b = torch.randn(3, 4), torch.randn(2)
    one = fingerprint({"a": a, "b": b})
    assert one == fingerprint({"b": b, "a": a.clone()}) and one.startswith("sha256:")
    others = [{"a": a, "c": b}, {"a": a.T, "b": b}, {"a": a + 1e-6, "b": b}, {"a": a.half(), "b": b}]
    assert len({one, *map(fingerprint, others)}) == 5
