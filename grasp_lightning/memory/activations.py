"""Memory that a pass needs besides the weights, from shapes alone.

Activations are the tensors that autograd keeps of a Llama-like decoder layer (two RMS norms,
attention that never forms its score matrix, a gated or plain MLP) and the largest short-lived
tensors. The interpreter, libraries and the device driver are not counted.

Legend: B windows of T tokens per forward pass; D hidden size, Q and G total widths of queries and
keys, I inner width of the MLP, V vocabulary size; e bytes per element of a weight, c of a computed
value (2 under bf16-mixed).
"""

from grasp_lightning.memory.shapes import ModelShape, Pass

FLOAT32 = 4
FLOAT64 = 8
HALF = 2
# The loss copies a few rows of logits at a time: in their dtype, in float32, and as probabilities.
LOSS_PARTS = 3 * FLOAT32 * 2**20


def layer_bytes(model: ModelShape, run: Pass) -> int:
    """Return the bytes that autograd keeps of one decoder layer with frozen weights.

    Per token: the float32 inputs of both norms, ``8 D``; queries and the attention output,
    ``2 Q c``; keys and values, ``2 G c``; one number per head, ``4``; both projections and the
    activation of a gated MLP, ``3 I c``, or only the activation of a plain one, ``I c``. Eager
    attention keeps its score matrix twice, ``8 T`` per head. Under bf16-mixed, autograd also keeps
    a bfloat16 copy of each float32 weight.
    """
    computed = computed_size(model, run)
    keys = model.queries if run.is_padded else model.keys
    num_inner = 3 if model.is_gated else 1
    per_token = 2 * FLOAT32 * model.hidden
    per_token += 2 * (model.queries + keys) * computed + FLOAT32 * model.num_heads
    per_token += num_inner * model.inner * computed
    if model.is_eager:
        per_token += 2 * FLOAT32 * run.seqlen * model.num_heads
    return run.num_tokens * per_token + _cast_weights(model, run)


def head_bytes(model: ModelShape, run: Pass, num_logits: int = 1) -> int:
    """Return the bytes that the head needs for the logits of ``num_logits`` models, and the loss.

    Per token: the logits, ``V c``, which the loss overwrites with their gradient; input and output
    of the last norm, ``4 D + c D``. The loss takes a few rows at a time.
    """
    computed = computed_size(model, run)
    per_token = num_logits * model.vocabulary * computed + (FLOAT32 + computed) * model.hidden
    return run.num_tokens * per_token + LOSS_PARTS


def forward_bytes(model: ModelShape, run: Pass) -> int:
    """Return the peak of a forward pass without autograd, which is inside an MLP."""
    computed = computed_size(model, run)
    return run.num_tokens * (3 * model.inner * computed + 4 * FLOAT32 * model.hidden)


def evaluation_bytes(model: ModelShape, run: Pass) -> int:
    """Return what measuring perplexity needs besides the weights: logits, or one layer's MLP."""
    return max(head_bytes(model, run), forward_bytes(model, run))


def sampling_bytes(model: ModelShape, run: Pass) -> int:
    """Return the bytes of keys and values while the model generates a batch of texts.

    Sliding windows and latents take less than this; Falcon, which repeats keys for all query
    heads, keeps more. States of state-space and linear-attention layers do not grow with T and are
    not counted.
    """
    num_layers = sum(layer.has_keys for layer in model.layers)
    return 2 * num_layers * model.keys * run.num_tokens * model.element_size


def computed_size(model: ModelShape, run: Pass) -> int:
    """Return c."""
    return HALF if run.is_mixed else model.element_size


def _cast_weights(model: ModelShape, run: Pass) -> int:
    if not run.is_mixed or model.element_size <= HALF:
        return 0
    linears = [linear for layer in model.layers for linear in layer.linears.values()]
    return HALF * sum(linear.parameters for linear in linears) // len(model.layers)
