"""CourseLM's model: MiniLM as a prefix language model, and its fast training pass.

The saved model is a plain `BertLMHeadModel` (`is_decoder=True`). A prompt is a row of *blocks*, one for each passage
("<|question|>…<|document|>[k] …"); a block is read in both directions, sees no other block, and its positions start
at 0. The answer ("<|answer|>…<|end|>") is written from left to right, sees all blocks, and its positions start at
`ANSWER_POSITION`. This is fusion-in-decoder (Izacard & Grave 2021) with one set of weights for reading and writing,
as in UniLM (Dong et al. 2019). `prefix_attention` gives the matching 4-D mask and positions for transformers.

The training pass below computes the same function from the same modules, without the padding that one long row
would need, in bfloat16 on copies of float32 weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertLMHeadModel

__all__ = ["ANSWER_POSITION", "Batch", "start_model", "forward_batch", "SPAN_LAYER"]

ANSWER_POSITION = 384
SPAN_LAYER = 4  # the auxiliary span head reads the hidden states after this many layers
#: layer: how many of its heads are taught to look at the token that comes next (the copying of an answer)
POINTER_HEADS = {4: 3, 5: 2}
MASKED = -3e4


@dataclass
class Batch:
    """Examples with the same number of blocks n, padded.

    blocks : (examples, n, block tokens) int64; block_mask : same shape, True at real tokens
    answers : (examples, answer tokens) int64, beginning with <|answer|>; targets : same shape, the next token, -100
        where none counts
    span : (examples, 2) int64, first and last position of the answer in the blocks laid end to end (0 = not there),
        -100 where unknown
    pointer : (examples, answer tokens) int64, where in the blocks the next token stands, -100 where nowhere
    """

    blocks: torch.Tensor
    block_mask: torch.Tensor
    answers: torch.Tensor
    targets: torch.Tensor
    span: torch.Tensor
    pointer: torch.Tensor

    def to(self, device: str) -> "Batch":
        return Batch(*(getattr(self, f).to(device) for f in ("blocks", "block_mask", "answers", "targets", "span", "pointer")))


def start_model(minilm_state: dict[str, torch.Tensor], embeddings: torch.Tensor, special: dict[str, int],
                seed: int = 0) -> BertLMHeadModel:
    """A `BertLMHeadModel` that starts from MiniLM: six layers, positions, and the given token embeddings."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(embeddings), hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
        intermediate_size=1536, max_position_embeddings=512, type_vocab_size=2, is_decoder=True,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, tie_word_embeddings=True,
        pad_token_id=special["pad"], bos_token_id=special["answer"], eos_token_id=special["end"])
    model = BertLMHeadModel(config)
    state = {f"bert.{k}": v for k, v in minilm_state.items() if "pooler" not in k and "position_ids" not in k}
    state["bert.embeddings.word_embeddings.weight"] = embeddings
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(k.startswith("cls.") for k in missing), (missing, unexpected)
    with torch.no_grad():
        transform = model.cls.predictions.transform
        # gelu(x) is nearly x/2 for small x and LayerNorm takes the scale away: close to the identity
        transform.dense.weight.copy_(0.1 * torch.eye(384) + 0.002 * torch.randn(384, 384))
        transform.dense.bias.zero_()
        transform.LayerNorm.weight.fill_(0.5)
        model.cls.predictions.bias.zero_()
    model.tie_weights()
    return model


class _Attention(torch.autograd.Function):
    """softmax(q kᵀ + mask) v on flat (batch·heads, tokens, size) tensors, a few rows at a time.

    The scores of a slice stay in the cache, and the backward pass computes them again instead of keeping them (Dao et al.
    2022); on two cores that is faster than torch's own kernels, whose backward pass is slow in bfloat16.
    """

    @staticmethod
    def _slices(q, k, heads):
        rows = max(1, 2_000_000 // (q.shape[1] * k.shape[1]) // heads) * heads
        return [slice(i, min(i + rows, len(q))) for i in range(0, len(q), rows)]

    @staticmethod
    def _probabilities(q, k, mask, heads, part):
        scores = torch.bmm(q[part], k[part].transpose(1, 2))
        if mask is not None:
            scores.view(-1, heads, *scores.shape[1:]).add_(mask[part.start // heads: part.stop // heads])
        return torch.softmax(scores, -1)

    @staticmethod
    def forward(ctx, q, k, v, mask, heads):
        ctx.save_for_backward(q, k, v, mask)
        ctx.heads = heads
        out = torch.empty_like(q)
        for part in _Attention._slices(q, k, heads):
            torch.bmm(_Attention._probabilities(q, k, mask, heads, part), v[part], out=out[part])
        return out

    @staticmethod
    def backward(ctx, g):
        q, k, v, mask = ctx.saved_tensors
        g = g.contiguous()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for part in _Attention._slices(q, k, ctx.heads):
            p = _Attention._probabilities(q, k, mask, ctx.heads, part)
            torch.bmm(p.transpose(1, 2), g[part], out=dv[part])
            ds = torch.ops.aten._softmax_backward_data(torch.bmm(g[part], v[part].transpose(1, 2)), p, -1, p.dtype)
            torch.bmm(ds, k[part], out=dq[part])
            torch.bmm(ds.transpose(1, 2), q[part], out=dk[part])
        return dq, dk, dv, None, None


def _weights(model: BertLMHeadModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: p.to(dtype) for name, p in model.named_parameters()}


def forward_batch(model: BertLMHeadModel, batch: Batch, dtype: torch.dtype = torch.bfloat16,
                  span_head: nn.Linear | None = None, dropout: float = 0.0):
    """Logits of the answer tokens that count, the span head's scores and the pointer loss.

    Returns
    -------
    logits : (number of targets that are not -100, vocabulary)
    span_scores : (examples, n·block tokens, 2) or None
    pointer_loss : scalar, mean negative log of the attention that the taught heads pay to the next token; 0 without
        `span_head`
    """
    config, w = model.config, _weights(model, dtype)
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    examples, n, length = batch.blocks.shape
    answer_length = batch.answers.shape[1]
    device = batch.blocks.device
    rows = examples * n
    cut = rows * length

    tokens = torch.cat([batch.blocks.reshape(-1), batch.answers.reshape(-1)])
    positions = torch.cat([torch.arange(length, device=device).repeat(rows),
                           (ANSWER_POSITION + torch.arange(answer_length, device=device)).repeat(examples)])
    prefix = "bert.embeddings."
    x = F.embedding(tokens, w[prefix + "word_embeddings.weight"]) + F.embedding(
        positions, w[prefix + "position_embeddings.weight"] + w[prefix + "token_type_embeddings.weight"][0])
    eps = config.layer_norm_eps
    x = F.layer_norm(x, (config.hidden_size,), w[prefix + "LayerNorm.weight"], w[prefix + "LayerNorm.bias"], eps)

    padded = not bool(batch.block_mask.all())
    block_bias = None
    if padded:
        block_bias = torch.zeros(rows, 1, 1, length, dtype=dtype, device=device)
        block_bias.masked_fill_(~batch.block_mask.view(rows, 1, 1, length), MASKED)
    causal = torch.full((answer_length, answer_length), MASKED, dtype=dtype, device=device).triu(1)
    answer_bias = torch.cat([
        torch.zeros(examples, 1, 1, n * length, dtype=dtype, device=device).masked_fill_(
            ~batch.block_mask.view(examples, 1, 1, n * length), MASKED).expand(-1, -1, answer_length, -1),
        causal.expand(examples, 1, -1, -1)], -1)

    scale = 1 / math.sqrt(size)
    span_scores, pointer_loss = None, torch.zeros((), device=device)
    pointed = batch.pointer != -100
    teach = span_head is not None and bool(pointed.any())
    for layer in range(config.num_hidden_layers):
        p = f"bert.encoder.layer.{layer}."
        a = p + "attention.self."
        weight = torch.cat([w[a + "query.weight"] * scale, w[a + "key.weight"], w[a + "value.weight"]])
        bias = torch.cat([w[a + "query.bias"] * scale, w[a + "key.bias"], w[a + "value.bias"]])
        qkv = F.linear(x, weight, bias)
        # (3, rows·heads, length, size)
        q, k, v = qkv[:cut].view(rows, length, 3, heads, size).permute(2, 0, 3, 1, 4).reshape(
            3, rows * heads, length, size).unbind(0)
        read = _Attention.apply(q, k, v, block_bias, heads)
        qa, ka, va = qkv[cut:].view(examples, answer_length, 3, heads, size).permute(2, 0, 3, 1, 4).reshape(
            3, examples * heads, answer_length, size).unbind(0)

        def beside(blocks, own):
            if n > 1:
                blocks = blocks.view(examples, n, heads, length, size).transpose(1, 2)
            return torch.cat([blocks.reshape(examples * heads, n * length, size), own], 1)

        keys = beside(k, ka)
        written = _Attention.apply(qa, keys, beside(v, va), answer_bias, heads)
        if teach and layer in POINTER_HEADS:
            few = POINTER_HEADS[layer]
            seen = torch.matmul(qa.view(examples, heads, answer_length, size)[:, :few],
                                keys.view(examples, heads, -1, size)[:, :few].transpose(2, 3)) + answer_bias
            seen = seen.transpose(1, 2)[pointed].float().log_softmax(-1)  # (pointed tokens, few, keys)
            pointer_loss = pointer_loss - seen.gather(2, batch.pointer[pointed][:, None, None].expand(-1, few, 1)).mean()
        mixed = torch.cat([
            read.view(rows, heads, length, size).transpose(1, 2).reshape(cut, -1),
            written.view(examples, heads, answer_length, size).transpose(1, 2).reshape(examples * answer_length, -1)])
        o = p + "attention.output."
        h = F.linear(mixed, w[o + "dense.weight"], w[o + "dense.bias"])
        if dropout:
            h = F.dropout(h, dropout)
        x = F.layer_norm(x + h, (config.hidden_size,), w[o + "LayerNorm.weight"], w[o + "LayerNorm.bias"], eps)
        if layer == config.num_hidden_layers - 1:  # from here on only the answers matter
            x = x[cut:][(batch.targets != -100).view(-1)]
        h = F.gelu(F.linear(x, w[p + "intermediate.dense.weight"], w[p + "intermediate.dense.bias"]))
        o = p + "output."
        h = F.linear(h, w[o + "dense.weight"], w[o + "dense.bias"])
        if dropout:
            h = F.dropout(h, dropout)
        x = F.layer_norm(x + h, (config.hidden_size,), w[o + "LayerNorm.weight"], w[o + "LayerNorm.bias"], eps)
        if layer + 1 == SPAN_LAYER and span_head is not None:
            span_scores = F.linear(x[:cut], span_head.weight.to(dtype), span_head.bias.to(dtype)).float()
            span_scores = span_scores.view(examples, n * length, 2).masked_fill(
                ~batch.block_mask.view(examples, n * length, 1), MASKED)
    t = "cls.predictions.transform."
    x = F.gelu(F.linear(x, w[t + "dense.weight"], w[t + "dense.bias"]))
    x = F.layer_norm(x, (config.hidden_size,), w[t + "LayerNorm.weight"], w[t + "LayerNorm.bias"], eps)
    logits = F.linear(x, w["bert.embeddings.word_embeddings.weight"], w["cls.predictions.bias"])
    return logits, span_scores, pointer_loss
