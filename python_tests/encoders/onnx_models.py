"""Tiny ONNX models in the true input and output layout of SCRFD, ArcFace and their neighbours in a model folder.

The detector really detects: a cell that is pure red scores high, so that colour order, normalisation, letterbox
and decoding all show in its answer. The recogniser projects a chip's mean colour, so that its input is checked
to the last digit.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# Reach of the one box in strides (left, top, right, bottom) and its five points (dx, dy) from the cell's corner.
REACH = (1.0, 2.0, 3.0, 4.0)
POINTS = ((0.0, -1.0), (1.5, -1.0), (0.75, 0.5), (0.25, 1.5), (1.25, 1.5))


def _save(path, nodes, inputs, outputs, constants):
    arrays = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, arrays)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def _info(name, shape):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def detector(path, size=None, batched=False, landmarks=True, named_shapes=True):
    """SCRFD's layout: outputs are 3 x scores, 3 x boxes, 3 x landmarks for strides 8, 16, 32, two anchors a cell."""
    nodes, outputs, constants = [], {1: [], 4: [], 10: []}, {}
    colour = np.zeros((2, 3, 1, 1), np.float32)
    colour[0, :, 0, 0] = (20, -20, -20)
    colour[1, :, 0, 0] = (20, -20, -20)
    # Red gives 20 * 2.98 - 45 = 14.6, a cell that is less than four fifths red nothing; the second anchor never.
    heads = {1: (colour, np.array([-45, -145], np.float32))}
    for width, values in ((4, REACH), (10, np.ravel(POINTS))):
        heads[width] = (np.zeros((2 * width, 3, 1, 1), np.float32), np.tile(np.asarray(values, np.float32), 2))
    for stride in (8, 16, 32):
        pooled = f"pool{stride}"
        nodes.append(
            helper.make_node("AveragePool", ["input.1"], [pooled], kernel_shape=[stride] * 2, strides=[stride] * 2)
        )
        for width in (1, 4, 10) if landmarks else (1, 4):
            name = f"out{width}_{stride}"
            for part, value in zip("wb", heads[width], strict=True):
                constants[f"{part}{width}"] = value
            shape = f"shape{width}" + ("b" if batched else "")
            constants[shape] = np.array([1, -1, width] if batched else [-1, width], np.int64)
            nodes.append(
                helper.make_node("Conv", [pooled, f"w{width}", f"b{width}"], [name + "c"], kernel_shape=[1, 1])
            )
            nodes.append(helper.make_node("Transpose", [name + "c"], [name + "t"], perm=[0, 2, 3, 1]))
            last = name + "r" if width == 1 else name
            nodes.append(helper.make_node("Reshape", [name + "t", shape], [last]))
            if width == 1:
                nodes.append(helper.make_node("Sigmoid", [last], [name]))
            rows = 2 * (size // stride) ** 2 if size else None
            dims = [1, rows, width] if batched else [rows, width]
            outputs[width].append(_info(name, dims if named_shapes else None))
    infos = [info for width in outputs for info in outputs[width]]
    return _save(path, nodes, [_info("input.1", [1, 3, size or "?", size or "?"])], infos, constants)


def recogniser(path, batch="None", length=512, own_scaling=False):
    """ArcFace's layout [N,3,112,112] -> [N,512]; ``own_scaling`` as in models that came from MXNet."""
    constants = {"proj": projection(length)}
    nodes, x = [], "input.1"
    if own_scaling:
        constants |= {"shift": np.float32(127.5), "gain": np.float32(1 / 127.5)}
        nodes.append(helper.make_node("Sub", [x, "shift"], ["centred"]))
        nodes.append(helper.make_node("Mul", ["centred", "gain"], ["scaled"]))
        x = "scaled"
    nodes.append(helper.make_node("GlobalAveragePool", [x], ["mean"]))
    nodes.append(helper.make_node("Flatten", ["mean"], ["flat"]))
    nodes.append(helper.make_node("MatMul", ["flat", "proj"], ["683"]))
    return _save(path, nodes, [_info("input.1", [batch, 3, 112, 112])], [_info("683", [1, length])], constants)


def projection(length=512):
    """The recogniser's matrix [3,length]."""
    return np.random.default_rng(7).normal(size=(3, length)).astype(np.float32)


def neighbour(path, side, length):
    """A further model of such a folder: landmarks (192 pixels) or gender and age (96 pixels)."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["data"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("MatMul", ["flat", "proj"], ["fc1"]),
    ]
    proj = np.zeros((3, length), np.float32)
    return _save(path, nodes, [_info("data", ["None", 3, side, side])], [_info("fc1", [1, length])], {"proj": proj})


def antelopev2(folder):
    """All five models under their own names."""
    detector(folder / "scrfd_10g_bnkps.onnx", named_shapes=True)
    recogniser(folder / "glintr100.onnx")
    neighbour(folder / "genderage.onnx", 96, 3)
    neighbour(folder / "2d106det.onnx", 192, 212)
    neighbour(folder / "1k3d68.onnx", 192, 3309)
    return folder
