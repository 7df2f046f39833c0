"""Fine-tune a Llama, a SmolLM2 or a Qwen2 on chats, from one process to many.

    python recipes/llama_sft.py --model DIR --data chats.jsonl --out runs/sft --save-every 100 --resume auto
    torchrun --nproc_per_node 4 recipes/llama_sft.py --mesh dp=2,sp=2 --model DIR --data chats.jsonl --out runs/sft

Everything from batch to update stands in `train_step`; what the ranks do is in the `shard(...)` call.
"""
import torch

import xtf
from xtf import cli, layout, models
from xtf.data import eval_batches
from xtf.optim import adamw, chain, clip_by_global_norm, guard, schedules
from xtf.run import Run


def main(argv: list[str] | None = None) -> None:
    flags = cli.parse(cli.Flags, argv, __doc__)
    with Run(flags) as run:
        if not run.finished:
            train(flags, run)


def train(flags: cli.Flags, run: Run) -> None:
    model, cfg = models.from_hf(flags.model)
    if model not in (models.llama, models.qwen2):
        raise ValueError(f"--model {flags.model}: {model.__name__} is neither Llama nor Qwen2; use recipes/qwen3_sft.py")
    schedule = schedules.cosine(flags.lr, flags.steps, flags.warmup)
    tx = chain(clip_by_global_norm(flags.clip), adamw(schedule, weight_decay=flags.weight_decay, moments=flags.moments))
    watch = guard()

    def train_step(state, batch, ops=xtf.LOCAL):
        num_tokens = ops.total(batch.loss_mask.sum()).clamp(min=1)  # over the whole global batch, beforehand

        def share(params, batch, ops):  # this rank's, this micro-batch's part of the loss
            return model.loss(params, batch, cfg, ops) / num_tokens
        loss, grads = xtf.microbatch(xtf.value_and_grad(share), len(batch.input_ids))(state.params, batch, ops)
        norm = ops.norm(grads)
        ok, seen = watch.check(state.extra, loss, norm)  # False: the step is skipped, on the device
        updates, opt = tx.update(grads, state.opt, state.params, ops, norm=norm, ok=ok)
        return state.apply(updates, opt, seen), {"loss": loss, "grad_norm": norm, "lr": schedule(state.step),
                                                 **watch.metrics(seen)}

    def eval_step(state, batch, ops=xtf.LOCAL):
        with torch.no_grad():
            return ops.total(torch.stack([model.loss(state.params, batch, cfg, ops), batch.loss_mask.sum()]).double())

    step = xtf.shard(train_step, *cli.transforms(flags), mesh=run.mesh, specs=model.specs(cfg))
    if flags.dry_run:
        return cli.say(layout.table(step.specs, step.layout))
    evaluate = xtf.shard(eval_step, *cli.transforms(flags, training=False), mesh=run.mesh, specs=model.specs(cfg))

    tokenizer = cli.tokenizer(flags)
    loader, held_out = cli.data(flags, tokenizer, cfg.vocab_size)
    if flags.show_batch:
        return cli.show(loader.step(0), tokenizer)
    params = cli.load(flags, step, model.names(cfg))
    state = xtf.TrainState.create(params, tx.init(params), watch.init(), flags.seed)
    state = run.begin(state, loader, model, cfg)  # the newest checkpoint's, if --resume finds one

    def held_out_loss(state):
        batches = eval_batches(held_out, flags.seq_len, loader.packs_per_step, run.mesh)
        nll, tokens = torch.stack([evaluate(state, cli.on_device(batch)) for batch in batches]).sum(0).tolist()
        return nll / max(tokens, 1)

    if held_out and run.first == 0:
        run.evaluation(0, held_out_loss(state))
    for i, batch in run.steps():
        state, metrics = step(state, batch)
        run.log(i, metrics)
        if held_out and run.evaluates(i):
            run.evaluation(i, held_out_loss(state))
        run.save(i, state)
    run.finish(state.params)


if __name__ == "__main__":
    cli.run(main)
