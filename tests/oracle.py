"""The oracle: a training loop written by hand, with torch and transformers alone. What outgrow computes is held against it.

It knows nothing of packing, masks, ranks, micro-batches or shards: each document goes through the model by itself, one
after the other, and the optimizer is PyTorch's plain AdamW.
"""

import torch
import transformers


def train(config, weights, steps, *, dtype, **settings):
    """Losses and gradient norms (before clipping) of every step, as two lists of floats, and the trained model.

    config   a transformers configuration; weights {parameter name: tensor}; settings as in ``train_model``
    """
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    model.load_state_dict(weights, strict=False)
    return *train_model(model, steps, **settings), model


def train_model(model, steps, *, rates, betas, eps, weight_decay, clip_norm):
    """Losses and gradient norms of every step of a model whose parameters are trained unless they are frozen.

    steps    for each step a list of documents (token_ids int64 [n], targets int64 [n], weights float [n])
    rates    the learning rate of each step
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() >= 2]
    vectors = [p for p in trained if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=betas, eps=eps, foreach=False)
    losses, norms = [], []
    for documents, rate in zip(steps, rates, strict=True):
        total = sum(float(w.double().sum()) for _, _, w in documents)
        loss_of_step = 0.0
        for token_ids, targets, w in documents:
            logits = model(input_ids=token_ids[None], use_cache=False).logits[0]
            counted = targets >= 0
            log_probs = torch.log_softmax(logits, dim=-1)[counted, targets[counted]]
            loss = -(log_probs * w[counted]).sum() / total
            loss.backward()
            loss_of_step += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(trained, clip_norm if clip_norm else float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss_of_step)
        norms.append(norm.item())
    return losses, norms
