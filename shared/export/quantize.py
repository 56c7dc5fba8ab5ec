"""Graphs of ONNX Runtime in 8 or 4 bits. Called by formats.py."""

import logging
import re
from pathlib import Path

# What four bits distort most, by parts of the names of weights: values of attention, what leaves the feed-forward part, the head
EIGHT_BITS = ("qkv_proj", "v_proj", "c_attn", "down_proj", "mlp.c_proj", "lm_head")


def quantize(source: Path, target: Path, bits: int, task: str) -> None:
    """Writes a graph with its matrix products in 8 or 4 bits.

    A model that writes reads all its weights for each token, so only weights are rounded, 32 with a scale (MatMulNBits); of 4
    bits EIGHT_BITS are left out. An encoder computes instead: both sides of its products are rounded to 8 bits, weights by
    channel, but for the head and for what leaves the feed-forward part, whose input has outliers. Weights get 7 of the 8
    bits: without VNNI, products of two 8-bit numbers are added in 16 bits and saturate.
    """
    import onnx

    if task in ("text-generation", "summarization"):
        graph = onnx.load(source)
        if bits == 4:
            products = (node for node in graph.graph.node if node.op_type == "MatMul")
            kept = [node.name for node in products if any(part in node.input[1] for part in EIGHT_BITS)]
            graph = _round_weights(graph, 4, kept).model
        _round_weights(graph, 8, []).save_model_to_file(str(target), use_external_data_format=True)
    else:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        graph = onnx.load(source, load_external_data=False).graph
        products = [node for node in graph.node if node.op_type == "MatMul"]
        kept = [
            node.name
            for node in products
            if re.search(r"qa_outputs|classifier|layer\.\d+\.output\.dense", node.input[1])
        ]
        logging.disable(logging.WARNING)  # it asks the root logger for a step that only images need
        try:
            quantize_dynamic(
                source,
                target,
                per_channel=True,
                reduce_range=True,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=["MatMul"],
                nodes_to_exclude=kept,
            )
        finally:
            logging.disable(logging.NOTSET)


def _round_weights(graph, bits: int, kept: list[str]):
    """The graph, as onnxruntime wraps it, with all matrix products but those kept on weights in 8 or 4 bits."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.ERROR)
    options = {"block_size": 32, "is_symmetric": bits == 8, "accuracy_level": 4, "nodes_to_exclude": kept}
    quantizer = MatMulNBitsQuantizer(graph, bits=bits, **options)
    quantizer.process()
    return quantizer.model
