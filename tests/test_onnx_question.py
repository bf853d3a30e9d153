"""The example that serves a picture question: the answer of the torch model, and no torch where it is served."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra: onnx)")
pytest.importorskip("onnxscript", reason="onnxscript is not installed (extra: onnx)")
from tests.test_small_vlm import needs_photos, needs_projector, needs_weights

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

SERVE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import onnx_question
from PIL import Image
with Image.open(sys.argv[3]) as picture:
    print(onnx_question.ask(Path(sys.argv[2]), picture.copy()))
loaded = [name for name in ("torch", "transformers", "onnx") if name in sys.modules]
assert not loaded, f"{loaded} were imported"
"""


PIXELS = """
import sys
sys.path.insert(0, sys.argv[1])
import onnx_question
from PIL import Image
print(onnx_question.pixels(Image.new("RGB", (300, 200), (250, 10, 10)))[0, :, 5, 5].tolist())
loaded = [name for name in ("torch", "transformers", "onnx") if name in sys.modules]
assert not loaded, f"{loaded} were imported"
"""


def test_the_serving_side_sees_the_same_pixels_without_torch() -> None:
    from PIL import Image

    from tests.test_small_vlm import small_vlm

    pytest.importorskip("tokenizers")
    done = subprocess.run(
        [sys.executable, "-c", PIXELS, str(EXAMPLES)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    wanted = small_vlm.to_pixels([Image.new("RGB", (300, 200), (250, 10, 10))])[0, :, 5, 5].tolist()
    assert json.loads(done.stdout) == wanted


@pytest.mark.slow
@needs_weights
@needs_projector
@needs_photos
def test_the_real_models_answer_without_torch(tmp_path: Path) -> None:
    sys.path.insert(0, str(EXAMPLES))
    import onnx_question
    import small_vlm

    import tokcompile

    report = onnx_question.export(tmp_path / "vlm", "vlm_prune_90", check=False)
    assert [item["tokens"] < item["of"] for item in report.manifest["kept"]] == [True, True]
    name, photo = small_vlm.demo_photos()[2]
    photo.save(tmp_path / f"{name}.png")
    done = subprocess.run(
        [sys.executable, "-c", SERVE, str(EXAMPLES), str(tmp_path / "vlm"), str(tmp_path / f"{name}.png")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    model, processor = small_vlm.load_vlm()
    pruned = tokcompile.optimize(model, recipe="vlm_prune_90", lowering="eager")
    inputs = processor.prepare([photo], onnx_question.QUESTION)
    wanted = processor.decode_answers(pruned.generate(**inputs, max_new_tokens=12, do_sample=False), inputs)[0]
    assert wanted
    assert done.stdout.strip() == wanted
