"""Fine-tune a Qwen3 on chats, from one process to many.

    python recipes/qwen3_sft.py --model DIR --data chats.jsonl --out runs/sft
    torchrun --nproc_per_node 4 recipes/qwen3_sft.py --mesh dp=2,sp=2 --model DIR --data chats.jsonl --out runs/sft

Everything from batch to update stands in `train_step`; what the ranks do is in the `shard(...)` call.
"""
from pathlib import Path

import torch
from transformers import AutoTokenizer

import xtf
from xtf import cli, hf, layout, models
from xtf.data import Loader, eval_batches
from xtf.log import Log
from xtf.optim import adamw, chain, clip_by_global_norm, schedules


def main(argv: list[str] | None = None) -> None:
    flags = cli.parse(cli.Flags, argv, __doc__)
    mesh = cli.start(flags)
    model, cfg = models.from_hf(flags.model)
    if model is not models.qwen3:
        raise ValueError(f"--model {flags.model}: {model.__name__} is not a Qwen3; use recipes/llama_sft.py")
    schedule = schedules.cosine(flags.lr, flags.steps, flags.warmup)
    tx = chain(clip_by_global_norm(flags.clip), adamw(schedule, weight_decay=flags.weight_decay))

    def train_step(state, batch, ops=xtf.LOCAL):
        num_tokens = ops.total(batch.loss_mask.sum()).clamp(min=1)              # over the whole global batch, beforehand

        def share(params, batch, ops):                                          # this rank's, this micro-batch's part of the loss
            return model.loss(params, batch, cfg, ops) / num_tokens
        loss, grads = xtf.microbatch(xtf.value_and_grad(share), len(batch.input_ids))(state.params, batch, ops)
        updates, opt = tx.update(grads, state.opt, state.params, ops)
        return state.apply(updates, opt), {"loss": loss, "grad_norm": opt[0]["norm"], "lr": schedule(state.step)}

    def eval_step(state, batch, ops=xtf.LOCAL):
        with torch.no_grad():
            return ops.total(torch.stack([model.loss(state.params, batch, cfg, ops), batch.loss_mask.sum()]).double())

    step = xtf.shard(train_step, *cli.transforms(flags), mesh=mesh, specs=model.specs(cfg))
    if flags.dry_run:
        return cli.say(layout.table(step.specs, step.layout))
    evaluate = xtf.shard(eval_step, *cli.transforms(flags, training=False), mesh=mesh, specs=model.specs(cfg))

    tokenizer = AutoTokenizer.from_pretrained(flags.model)
    train, held_out = cli.samples(flags, tokenizer, cfg.vocab_size)
    loader = Loader(train, flags.seq_len, flags.batch_tokens // flags.seq_len, flags.seed)
    params = cli.on_device(hf.load(flags.model, step.specs, model.names(cfg), step.layout))
    state = xtf.TrainState.create(params, tx.init(params), seed=flags.seed)

    def held_out_loss():
        batches = eval_batches(held_out, flags.seq_len, loader.packs_per_step, mesh)
        nll, tokens = torch.stack([evaluate(state, cli.on_device(batch)) for batch in batches]).sum(0).tolist()
        return nll / max(tokens, 1)

    with Log(flags, model, cfg, mesh) as log:
        if held_out:
            log.evaluation(0, held_out_loss())
        for i in range(flags.steps):
            state, metrics = step(state, cli.on_device(loader.step(i, mesh)))
            log.step(i + 1, metrics, loader.documents(i))
            if held_out and (i + 1 == flags.steps or (flags.eval_every and (i + 1) % flags.eval_every == 0)):
                log.evaluation(i + 1, held_out_loss())
    hf.save(Path(flags.out) / "hf", state.params, model.names(cfg), like=flags.model)
    cli.say(f"{flags.out}/hf: the model, as transformers loads it")


if __name__ == "__main__":
    cli.run(main)
