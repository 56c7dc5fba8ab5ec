"""Graphs of ONNX Runtime in 8 or 4 bits. Called by formats.py."""

import logging
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

BLOCK = 32  # weights with a scale
# What four bits distort most, by parts of the names of weights: values of attention, what leaves the feed-forward part, the head
IN_FP32 = r"qa_outputs|classifier|layer\.\d+\.output\.dense"  # of an encoder
EIGHT_BITS = ("qkv_proj", "v_proj", "c_attn", "down_proj", "mlp.c_proj", "lm_head")


def quantize(source: Path, target: Path, bits: int, task: str, kept_layers: Sequence[str] = ()) -> None:
    """Writes a graph with its matrix products in 8 or 4 bits.

    A model that writes reads all its weights for each token, so only weights are rounded, 32 with a scale (MatMulNBits); of 4
    bits EIGHT_BITS are left out, unless they are held exactly. An encoder computes instead: both sides of its products are
    rounded to 8 bits, weights by channel, but for the head and for what leaves the feed-forward part, whose input has outliers.
    Weights get 7 of the 8 bits: without VNNI, products of two 8-bit numbers are added in 16 bits and saturate.

    Args:
        kept_layers: of an encoder, those that stay in fp32 (see `fewer_rounded`).
    """
    import onnx

    if task in ("text-generation", "summarization"):
        graph = onnx.load(source)
        if bits == 4:
            _keep_four_bits(graph)
            products = (node for node in graph.graph.node if node.op_type == "MatMul")
            kept = [node.name for node in products if any(part in node.input[1] for part in EIGHT_BITS)]
            graph = _round_weights(graph, 4, kept).model
        _round_weights(graph, 8, []).save_model_to_file(str(target), use_external_data_format=True)
    else:
        layers = _products(source)
        _round_both_sides(
            source, target, [name for layer in layers if layer not in kept_layers for name in layers[layer]]
        )


def fewer_rounded(source: Path, rows: Sequence[Sequence[int]]) -> list[list[str]]:
    """What to keep in fp32 where an encoder with all its layers rounded is too different: the third of the layers whose rounding,
    each alone, moves the outputs most; then two thirds. As `quantize` takes them.

    Args:
        source: the graph in fp32.
        rows: token ids of some texts.
    """
    import onnxruntime

    def outputs(graph: Path) -> list[np.ndarray]:
        session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        names, found = {each.name for each in session.get_inputs()}, []
        for row in rows:
            batch = {"input_ids": [row], "attention_mask": [[1] * len(row)], "token_type_ids": [[0] * len(row)]}
            found += session.run(None, {name: np.array(batch[name], np.int64) for name in names})
        return found

    expected, moved = outputs(source), {}
    with tempfile.TemporaryDirectory() as folder:
        for layer, names in _products(source).items():
            rounded = Path(folder) / source.name
            _round_both_sides(source, rounded, names)
            pairs = zip(outputs(rounded), expected, strict=True)
            moved[layer] = sum(float(np.square(found - right).sum()) for found, right in pairs)
    worst = sorted(moved, key=moved.get, reverse=True)
    return [worst[:most] for most in sorted({len(worst) // 3, 2 * len(worst) // 3} - {0})]


def _products(source: Path) -> dict[str, list[str]]:
    """Names of the matrix products of an encoder's graph that may be rounded, by layer (its number; "" outside of layers)."""
    import onnx

    graph, layers = onnx.load(source, load_external_data=False).graph, {}
    weights = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[1] not in weights or re.search(IN_FP32, node.input[1]):
            continue
        number = re.search(r"\.(\d+)\.", node.input[1])
        layers.setdefault(number[1] if number else "", []).append(node.name)
    return layers


def _round_both_sides(source: Path, target: Path, products: list[str]) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.disable(logging.WARNING)  # it asks the root logger for a step that only images need
    try:
        quantize_dynamic(
            source,
            target,
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=products,
        )
    finally:
        logging.disable(logging.NOTSET)


def _keep_four_bits(model) -> None:
    """Replaces the products of an onnx.ModelProto whose weights 4 bits hold exactly: each block of 32 has 16 levels, from its
    smallest to its largest, as what was read from Q4_1 of llama.cpp.

    MatMulNBits knows only levels of which one is zero: moved there, all weights of a block would be wrong by the same, up to
    half a step. So the lowest levels are a product of their own, with the sums over the blocks of what the weights are
    multiplied with: a 32nd of the work. Of weights that lie anywhere (an adapter was merged in, say) that grid would be the worst
    one: it takes away what little each was moved by in training.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) == 2}
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in [*graph.input, *graph.value_info]}
    nodes, summed, replaced = [], set(), set()

    def constant(name: str, values: np.ndarray) -> str:
        graph.initializer.append(numpy_helper.from_array(values, name))
        return name

    for node in graph.node:
        found = None
        if node.op_type == "MatMul" and node.input[1] in weights:
            found = _levels(numpy_helper.to_array(weights[node.input[1]]))
        if found is None:
            nodes.append(node)
            continue
        (x, name), (out,), (level, step, lowest) = node.input, node.output, found
        replaced.add(name)
        outputs, blocks = step.shape
        if x not in summed:
            summed.add(x)
            shape = constant(f"{x}_blocks_shape", np.array([*[0] * (ranks.get(x, 3) - 1), blocks, BLOCK]))
            nodes.append(helper.make_node("Reshape", [x, shape], [f"{x}_blocks"], f"{x}_blocks"))
            last = constant(f"{x}_sums_axis", np.array([-1]))
            nodes.append(helper.make_node("ReduceSum", [f"{x}_blocks", last], [f"{x}_sums"], f"{x}_sums", keepdims=0))
        held = constant(f"{name}_levels", level[..., ::2] | level[..., 1::2] << 4)
        inputs = [x, held, constant(f"{name}_steps", step.ravel())]
        sizes = {"K": blocks * BLOCK, "N": outputs, "bits": 4, "block_size": BLOCK, "accuracy_level": 4}
        where = {"name": f"{node.name}_levels", "domain": "com.microsoft"}
        nodes.append(helper.make_node("MatMulNBits", inputs, [f"{out}_levels"], **where, **sizes))
        # What MatMulNBits multiplies is the level less 8
        moved = constant(f"{name}_lowest", np.ascontiguousarray((lowest + 8 * step).T))
        nodes.append(helper.make_node("MatMul", [f"{x}_sums", moved], [f"{out}_lowest"], f"{node.name}_lowest"))
        nodes.append(helper.make_node("Add", [f"{out}_levels", f"{out}_lowest"], [out], f"{node.name}_added"))
    used = [tensor for tensor in graph.initializer if tensor.name not in replaced]
    for kept, changed in ((graph.node, nodes), (graph.initializer, used)):
        del kept[:]
        kept.extend(changed)


def _levels(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """A weight (inputs, outputs) by blocks of 32 inputs: the level of each, 0 to 15 (outputs, blocks, 32), the step from level
    to level and the lowest (outputs, blocks). None where inputs make no blocks or weights lie between levels.
    """
    if len(weight) % BLOCK or (weight.shape[1] > 8 and _levels(weight[:, :8]) is None):
        return None
    blocks = weight.T.reshape(weight.shape[1], -1, BLOCK)
    lowest = blocks.min(-1)
    step = (blocks.max(-1) - lowest) / 15
    step[step == 0] = 1
    level = np.rint((blocks - lowest[..., None]) / step[..., None])
    missed = np.abs(level * step[..., None] + lowest[..., None] - blocks).max(-1)
    return None if (missed > 1e-4 * step).any() else (level.astype(np.uint8), step, lowest)


def _round_weights(model, bits: int, kept: list[str]):
    """The graph, as onnxruntime wraps it, with all matrix products but those kept on weights in 8 or 4 bits."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.ERROR)
    kept = kept + [node.name for node in model.graph.node if node.name.endswith("_lowest")]
    options = {"block_size": BLOCK, "is_symmetric": bits == 8, "accuracy_level": 4, "nodes_to_exclude": kept}
    quantizer = MatMulNBitsQuantizer(model, bits=bits, **options)
    quantizer.process()
    return quantizer.model
