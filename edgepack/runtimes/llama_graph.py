"""The room llama.cpp's compute buffer needs: its graph for one full batch, placed by its own rules.

llama.cpp reserves the buffer before it runs, by walking the graph of the largest batch and placing every
tensor where a freed one fits best. That walk needs only shapes, so it is repeated here: the graph as
src/models/*.cpp and src/llama-graph.cpp build it, the placement as ggml/src/ggml-alloc.c does it, the split
between host and accelerator as ggml/src/ggml-backend.cpp does it. The tests hold it to llama.cpp itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

_F32, _F16, _I32, _I64 = 4, 2, 4, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What shapes one decoder pass."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tokens: int
    """Tokens of one pass, a multiple of the number of streams."""
    outputs: int
    """Rows of logits."""
    cells: int
    """KV cells per stream of the full-attention layers."""
    streams: int
    window_cells: int = 0
    """KV cells per stream of the sliding-window layers; 0 when there are none."""
    period: int = 0
    """With a window: layer il has full attention iff il % period == period - 1."""
    flash_attention: bool = True
    rotate_k: bool = False
    rotate_v: bool = False
    """Quantized K or V are rotated by a Hadamard matrix (src/llama-kv-cache.cpp, attn_rot_k)."""
    cast_k: bool = False
    cast_v: bool = False
    """F32 K or V are cast to F16 for flash attention (src/llama-graph.cpp, build_attn_mha)."""
    unpack_k: bool = False
    unpack_v: bool = False
    """K or V are not F16: CUDA's flash attention unpacks them whole beside its result
    (ggml-cuda/fattn-common.cuh, ggml_cuda_flash_attn_ext_get_f16_extra_data)."""
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    sandwich_norms: bool = False
    """Gemma: norms after attention and FFN, scaled embeddings and queries."""
    mlp_bias: bool = False
    experts: int = 0
    experts_used: int = 0
    expert_ffn: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Bytes of the compute buffers."""

    device: int
    host: int
    """Buffer on the host side of an accelerator; 0 when everything runs on the CPU."""


def room(batch: Batch, *, offloaded: bool, alignment: int, unpack: bool = False) -> Room:
    """Bytes that llama.cpp reserves for ``batch``; ``offloaded``: all layers on one accelerator.

    ``unpack``: its flash attention unpacks a KV cache that is not F16 into its buffer.
    """
    return whole_room(_few_layers(batch), offloaded=offloaded, alignment=alignment, unpack=unpack)


_STEADY = 8
"""Layers after which placement repeats: a layer frees what it takes, and what is freed is found again two layers on."""


def _few_layers(batch: Batch) -> Batch:
    """The same batch with so few layers that the walk is short and its high-water mark the same."""
    step = 2 * (batch.period or 1)
    extra = max(batch.layers - _STEADY, 0)
    return replace(batch, layers=batch.layers - extra + extra % step)


def whole_room(batch: Batch, *, offloaded: bool, alignment: int, unpack: bool = False) -> Room:
    """The same, every layer walked; what the tests hold `room` to."""
    graph = _decoder(batch, unpack=unpack)
    if not offloaded:
        return Room(device=_high_water(graph.leafs, graph.nodes, alignment), host=0)
    first = graph.embedding
    host_inputs = [leaf for leaf in graph.leafs if leaf.size]
    host = sum(_aligned(t.size, alignment) for t in [*host_inputs, first])
    return Room(device=_high_water((), _on_device(graph, first), alignment), host=host)


class _Tensor:
    __slots__ = (
        "allocated",
        "at",
        "children",
        "inplace",
        "keep",
        "leaf",
        "root",
        "seen",
        "shape",
        "size",
        "sources",
        "views",
    )

    def __init__(
        self,
        shape: tuple[int, ...],
        sources: tuple[_Tensor, ...] = (),
        *,
        item: int = _F32,
        inplace: bool = False,
        root: _Tensor | None = None,
        leaf: bool = False,
    ) -> None:
        elements = 1
        for n in shape:
            elements *= n
        self.shape = shape
        self.size = elements * item
        self.sources = sources
        self.inplace = inplace
        self.root = root
        """Tensor this is a view of; views take no room and are never written in place."""
        self.leaf = leaf
        self.keep = False
        """An output of the graph: never freed, never written over."""
        self.seen = False
        self.children = 0
        self.views = 0
        self.at = 0
        self.allocated = False


class _Graph:
    """Nodes and inputs as ggml visits them: sources first, left to right (ggml_visit_parents_graph).

    Weights and the KV cache have buffers of their own and are left out.
    """

    def __init__(self) -> None:
        self.leafs: list[_Tensor] = []
        self.nodes: list[_Tensor] = []
        self.embedding: _Tensor

    def expand(self, tensor: _Tensor) -> None:
        if tensor.seen:
            return
        tensor.seen = True
        for source in tensor.sources:
            self.expand(source)
        (self.leafs if tensor.leaf else self.nodes).append(tensor)


def _input(shape: tuple[int, ...], item: int) -> _Tensor:
    return _Tensor(shape, item=item, leaf=True)


def _new(shape: tuple[int, ...], *sources: _Tensor) -> _Tensor:
    """A result with room of its own: mul_mat, get_rows, GLU, flash attention, copies."""
    return _Tensor(shape, sources)


def _inplace(source: _Tensor, *more: _Tensor) -> _Tensor:
    """A result that may take its source's room: add, mul, rms_norm, rope, scale, soft_max."""
    return _Tensor(source.shape, (source, *more), inplace=True)


def _view(source: _Tensor, shape: tuple[int, ...]) -> _Tensor:
    return _Tensor(shape, (source,), root=source.root or source)


def _norm(x: _Tensor) -> _Tensor:
    """RMS norm, then its weight."""
    return _inplace(_inplace(x))


@dataclass(frozen=True, slots=True, kw_only=True)
class _AttentionInputs:
    k_rows: _Tensor
    v_rows: _Tensor
    mask: _Tensor
    k_rotation: _Tensor | None
    v_rotation: _Tensor | None
    cells: int
    unpacked: int
    """Bytes of K and V unpacked beside the result of flash attention."""


def _decoder(b: Batch, *, unpack: bool) -> _Graph:
    graph = _Graph()
    tokens, unused = _input((b.tokens,), _I32), _input((b.hidden, b.tokens), _F32)
    x = _new((b.hidden, b.tokens), tokens)
    graph.embedding = x
    graph.expand(x)
    graph.expand(unused)
    if b.sandwich_norms:
        x = _inplace(x)
    positions, out_ids = _input((b.tokens,), _I32), _input((b.outputs,), _I32)
    full = _attention_inputs(b, b.cells, unpack=unpack)
    window = _attention_inputs(b, b.window_cells, unpack=unpack) if b.window_cells else full
    for il in range(b.layers):
        sliding = b.window_cells and il % b.period != b.period - 1
        x = _layer(
            graph, b, x, positions, window if sliding else full, out_ids if il == b.layers - 1 else None
        )
    x = _norm(x)
    x.keep = True
    logits = _new((b.vocab, b.outputs), x)
    logits.keep = True
    graph.expand(logits)
    return graph


def _attention_inputs(b: Batch, cells: int, *, unpack: bool) -> _AttentionInputs:
    k_side = 64
    while b.head_dim % (2 * k_side) == 0:
        k_side *= 2
    v_rows = b.tokens if b.flash_attention else b.tokens * b.kv_heads * b.head_dim
    return _AttentionInputs(
        k_rows=_input((b.tokens,), _I64),
        v_rows=_input((v_rows,), _I64),
        mask=_input((cells, b.tokens // b.streams, 1, b.streams), _F16 if b.flash_attention else _F32),
        k_rotation=_input((k_side, k_side), _F32) if b.rotate_k else None,
        v_rotation=_input((64, 64), _F32) if b.rotate_v else None,
        cells=cells,
        unpacked=(b.unpack_k + b.unpack_v) * _F16 * b.head_dim * b.kv_heads * cells * b.streams
        if unpack
        else 0,
    )


def _layer(
    graph: _Graph, b: Batch, x: _Tensor, positions: _Tensor, inputs: _AttentionInputs, out_ids: _Tensor | None
) -> _Tensor:
    skip = x
    normed = _norm(x)
    q = _projection(b, normed, b.heads)
    k = _projection(b, normed, b.kv_heads)
    v = _projection(b, normed, b.kv_heads)
    q = _inplace(_norm(q) if b.qk_norm else q, positions)
    k = _inplace(_norm(k) if b.qk_norm else k, positions)
    if b.sandwich_norms:
        q = _inplace(q)
    x = _attention(graph, b, q, k, v, inputs)
    x = _new((b.hidden, b.tokens), x)
    if b.output_bias:
        x = _inplace(x)
    if out_ids is not None:
        x = _new((b.hidden, b.outputs), x, out_ids)
        skip = _new((b.hidden, b.outputs), skip, out_ids)
    if b.sandwich_norms:
        x = _norm(x)
    middle = _inplace(x, skip)
    x = _experts(graph, b, _norm(middle)) if b.experts else _ffn(b, _norm(middle))
    if b.sandwich_norms:
        x = _norm(x)
    return _inplace(x, middle)


def _projection(b: Batch, x: _Tensor, heads: int) -> _Tensor:
    y = _new((heads * b.head_dim, b.tokens), x)
    if b.qkv_bias:
        y = _inplace(y)
    return _view(y, (b.head_dim, heads, b.tokens))


def _attention(
    graph: _Graph, b: Batch, q: _Tensor, k: _Tensor, v: _Tensor, inputs: _AttentionInputs
) -> _Tensor:
    if inputs.k_rotation is not None:
        q, k = _rotated(q, inputs.k_rotation), _rotated(k, inputs.k_rotation)
    if inputs.v_rotation is not None:
        v = _rotated(v, inputs.v_rotation)
    order = (q, k, v) if b.window_cells else (q, v, k)
    for tensor in order:
        graph.expand(tensor)
    rows = (b.kv_heads * b.head_dim, b.tokens)
    cache = _Tensor((0,), leaf=True)
    graph.expand(_Tensor((0,), (_view(k, rows), inputs.k_rows), root=cache))
    v_rows = _view(v, rows) if b.flash_attention else _view(_view(v, rows), (1, rows[0] * rows[1]))
    graph.expand(_Tensor((0,), (v_rows, inputs.v_rows), root=cache))
    per_stream = (b.head_dim, b.heads, b.tokens // b.streams, b.streams)
    query = _view(_view(q, per_stream), per_stream)
    if b.flash_attention:
        result = _flash(b, query, inputs)
    else:
        result = _softmax_attention(b, query, inputs)
    graph.expand(result)
    return _rotated(result, inputs.v_rotation) if inputs.v_rotation is not None else result


def _flash(b: Batch, query: _Tensor, inputs: _AttentionInputs) -> _Tensor:
    size = (b.head_dim * b.kv_heads * inputs.cells * b.streams,)
    casts = tuple(_Tensor(size, item=_F16) for cast in (b.cast_k, b.cast_v) if cast)
    result = _new((b.head_dim, b.heads, b.tokens), query, *casts, inputs.mask)
    result.size += inputs.unpacked
    return _view(result, (b.head_dim * b.heads, b.tokens))


def _softmax_attention(b: Batch, query: _Tensor, inputs: _AttentionInputs) -> _Tensor:
    scores = _new((inputs.cells, b.tokens // b.streams, b.heads, b.streams), query)
    weights = _inplace(scores, inputs.mask)
    mixed = _new((b.head_dim, b.tokens // b.streams, b.heads, b.streams), weights)
    return _new((b.head_dim * b.heads, b.tokens), _view(mixed, mixed.shape))


def _rotated(x: _Tensor, rotation: _Tensor) -> _Tensor:
    elements = 1
    for n in x.shape:
        elements *= n
    side = rotation.shape[0]
    flat = (side, elements // side)
    return _view(_new(flat, rotation, _view(x, flat)), x.shape)


def _ffn(b: Batch, x: _Tensor) -> _Tensor:
    rows = x.shape[1]
    up, gate = _new((b.ffn, rows), x), _new((b.ffn, rows), x)
    if b.mlp_bias:
        up, gate = _inplace(up), _inplace(gate)
    down = _new((b.hidden, rows), _new((b.ffn, rows), gate, up))
    return _inplace(down) if b.mlp_bias else down


def _experts(graph: _Graph, b: Batch, x: _Tensor) -> _Tensor:
    rows, used = x.shape[1], b.experts_used
    probabilities = _inplace(_new((b.experts, rows), x))
    selected = _view(_Tensor((b.experts, rows), (probabilities,), item=_I32), (used, rows))
    weights = _new((1, used, rows), _view(probabilities, (1, b.experts, rows)), selected)
    weights = _view(weights, (used, rows))
    total = _inplace(_new((1, rows), weights))
    weights = _view(_inplace(weights, total), (1, used, rows))
    graph.expand(weights)
    wide = _view(x, (b.hidden, 1, rows))
    up = _new((b.expert_ffn, used, rows), wide, selected)
    gate = _new((b.expert_ffn, used, rows), wide, selected)
    mixed = _inplace(
        _new((b.hidden, used, rows), _new((b.expert_ffn, used, rows), gate, up), selected), weights
    )
    graph.expand(mixed)
    parts = [_view(mixed, (b.hidden, rows, 0)) for _ in range(used)]
    for part in parts:
        graph.expand(part)
    result = parts[0]
    for part in parts[1:]:
        result = _Tensor((b.hidden, rows), (result, part), inplace=True)
        graph.expand(result)
    return result if used > 1 else _new((b.hidden, rows), result)


def _on_device(graph: _Graph, embedding: _Tensor) -> list[_Tensor]:
    """The accelerator's part: copies of what the host hands over, in order of first use, then the nodes.

    ggml_backend_sched_split_graph, pass 5: inputs and the looked-up embeddings live on the host.
    """
    copies: dict[int, _Tensor] = {}
    nodes = [node for node in graph.nodes if node is not embedding]
    for node in nodes:
        swapped = []
        for source in node.sources:
            if (source.leaf or source is embedding) and source.size:
                source = copies.setdefault(
                    id(source), _Tensor(source.shape, item=source.size // _count(source))
                )
            swapped.append(source)
        node.sources = tuple(swapped)
    return [*copies.values(), *nodes]


def _count(tensor: _Tensor) -> int:
    elements = 1
    for n in tensor.shape:
        elements *= n
    return elements


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _high_water(leafs: Iterable[_Tensor], nodes: Sequence[_Tensor], alignment: int) -> int:
    """Bytes of the buffer after placing every tensor (ggml-alloc.c, ggml_gallocr_alloc_graph_impl)."""
    space = _Space(alignment)
    for leaf in leafs:
        if leaf.size:
            leaf.at, leaf.allocated = space.take(leaf.size), True
    for node in nodes:
        if node.root is not None:
            node.root.views += 1
        for source in node.sources:
            source.children += 1
    for node in nodes:
        if node.root is None and not node.allocated:
            _place(space, node)
        for source in node.sources:
            source.children -= 1
            if source.children or source.views:
                continue
            if source.root is not None:
                root = source.root
                root.views -= 1
                if not root.views and not root.children and root.allocated:
                    _free(space, root)
            elif source.allocated:
                _free(space, source)
    return space.high


def _place(space: _Space, node: _Tensor) -> None:
    node.allocated = True
    if node.inplace:
        for parent in node.sources:
            if not parent.allocated or parent.keep or parent.shape != node.shape or parent.size != node.size:
                continue
            if parent.children == 1 and parent.views == 0:
                node.at, parent.allocated = parent.at, False
                return
    node.at = space.take(node.size)


def _free(space: _Space, tensor: _Tensor) -> None:
    if tensor.keep:
        return
    space.give(tensor.at, tensor.size)
    tensor.allocated = False


class _Space:
    """Free blocks sorted by address; the last one has no end (ggml_dyn_tallocr)."""

    def __init__(self, alignment: int) -> None:
        self.alignment = alignment
        self.high = 0
        self.blocks: list[list[int]] = [[0, 1 << 62]]

    def take(self, size: int) -> int:
        size = _aligned(size, self.alignment)
        best = len(self.blocks) - 1
        smallest = 1 << 62
        for i, (_, length) in enumerate(self.blocks[:-1]):
            if size <= length <= smallest:
                best, smallest = i, length
        block = self.blocks[best]
        at = block[0]
        block[0] += size
        block[1] -= size
        if block[1] == 0:
            del self.blocks[best]
        self.high = max(self.high, at + size)
        return at

    def give(self, at: int, size: int) -> None:
        size = _aligned(size, self.alignment)
        blocks = self.blocks
        for i, block in enumerate(blocks):
            if block[0] + block[1] == at:
                block[1] += size
                if i + 1 < len(blocks) and block[0] + block[1] == blocks[i + 1][0]:
                    block[1] += blocks[i + 1][1]
                    del blocks[i + 1]
                return
            if at + size == block[0]:
                block[0] = at
                block[1] += size
                if i > 0 and blocks[i - 1][0] + blocks[i - 1][1] == block[0]:
                    blocks[i - 1][1] += block[1]
                    del blocks[i]
                return
        position = sum(1 for block in blocks if block[0] < at)
        blocks.insert(position, [at, size])
