"""What a pass through a model needs beside the weights, from shapes alone.

Activations are what autograd keeps of a decoder layer of the Llama kind (two RMS norms, attention
that never forms its matrix of scores, an MLP that is gated or not), and the largest of what comes
and goes beside it. Interpreter, libraries and what a device's driver takes are not in any number.

Legend: B windows of T tokens per forward pass; D hidden size, Q and G widths of all queries and of
all keys, I inner width of the MLP, V words; e bytes per element of a weight, c of what is computed
(2 under bf16-mixed).
"""

from grasp_lightning.memory.shapes import ModelShape, Pass

FLOAT32 = 4
FLOAT64 = 8
HALF = 2
# What the loss makes of a few rows of logits at a time: as they are, in float32, as probabilities.
LOSS_PARTS = 3 * FLOAT32 * 2**20


def layer_bytes(model: ModelShape, run: Pass) -> int:
    """Return what autograd keeps of one decoder layer whose weights are frozen.

    Per token: the inputs of both norms in float32, ``8 D``; queries and the output of attention,
    ``2 Q c``; keys and values, ``2 G c``; one number per head, ``4``; of the MLP both projections
    and the activated one, ``3 I c``, or without a gate what is activated, ``I c``. Attention that
    forms its matrix of scores keeps them twice, ``8 T`` per head. Under bf16-mixed autograd also
    keeps each float32 weight in bfloat16.

    Args:
        model: The model.
        run: What runs through it.

    Returns:
        Bytes.
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
    """Return what the head of a model and the loss need.

    Per token: logits once, ``V c``, since the loss puts their gradient in their place; input and
    output of the last norm, ``4 D + c D``. The loss takes a few rows at a time.

    Args:
        model: The model.
        run: What runs through it.
        num_logits: How many models give logits: with a teacher there are two.

    Returns:
        Bytes.
    """
    computed = computed_size(model, run)
    per_token = num_logits * model.vocabulary * computed + (FLOAT32 + computed) * model.hidden
    return run.num_tokens * per_token + LOSS_PARTS


def forward_bytes(model: ModelShape, run: Pass) -> int:
    """Return what a forward pass without autograd needs at its peak, in one MLP."""
    computed = computed_size(model, run)
    return run.num_tokens * (3 * model.inner * computed + 4 * FLOAT32 * model.hidden)


def evaluation_bytes(model: ModelShape, run: Pass) -> int:
    """Return what a pass that measures perplexity needs beside the weights.

    Args:
        model: The model.
        run: Windows of one forward pass.

    Returns:
        Bytes: logits, or one layer's MLP.
    """
    return max(head_bytes(model, run), forward_bytes(model, run))


def sampling_bytes(model: ModelShape, run: Pass) -> int:
    """Return what a model that writes text needs beside the weights.

    Args:
        model: The model.
        run: Texts that are written together.

    Returns:
        Bytes: keys and values of all tokens. Layers that attend to a sliding window keep fewer,
        Falcon's that repeat keys for all heads of queries more. The states of state-space and
        linear-attention layers do not grow with T and are not counted.
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
