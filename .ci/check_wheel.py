"""Run away from the checkout: the installed wheel is complete and its compiled module works."""

import sys
from pathlib import Path

import idcore

site = Path(sys.argv[1]).resolve()
assert Path(idcore.__file__).resolve().is_relative_to(site), f"imported {idcore.__file__}, wanted the wheel in {site}"

import torch  # noqa: E402

from idcore import _C  # noqa: E402

assert Path(_C.__file__).resolve().is_relative_to(site), _C.__file__
q, k = torch.randn(1, 2, 33, 64), torch.randn(1, 2, 7, 64)
ours = idcore.id_attention(q, k, k, k, k, merge="ortho_v2", num_zero=3, backend="cpu")
truth = idcore.id_attention(q, k, k, k, k, merge="ortho_v2", num_zero=3, backend="reference")
assert (ours - truth).abs().max() < 1e-5

from idcore.kernels import id_attention as triton_stem  # noqa: E402,F401

photo = site / "idcore/assets/photos/astronaut.png"
faces = idcore.default_analyzer().detect(idcore.load_image(photo))
assert len(faces) >= 1, "no face found by the packaged models"
pipe = idcore.TinyPipeline.from_package()
print("wheel complete:", idcore.__version__, _C.build_info()["isa"], "faces", len(faces), type(pipe).__name__)
