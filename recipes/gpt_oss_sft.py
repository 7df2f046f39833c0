r"""Fine-tune a GPT-OSS on chats, from one process to many.

    python recipes/gpt_oss_sft.py --model DIR --data chats.jsonl --out runs/sft --save-every 100 --resume auto
    torchrun --nproc_per_node 8 recipes/gpt_oss_sft.py --mesh dp=2,ep=4 --overlap \
        --model DIR --data chats.jsonl --out runs/sft

A directory in MXFP4 is dequantised as it is read, and what is written is bf16. Everything from batch to update stands
in `train_step`; what the ranks do is in the `shard(...)` call.
"""
import xtf
from xtf import cli, models, moe
from xtf.run import Run

Flags = cli.ExpertFlags


def main(argv: list[str] | None = None) -> None:
    flags = cli.parse(Flags, argv, __doc__)
    with Run(flags) as run:
        if not run.finished:
            train(flags, run)


def train(flags: Flags, run: Run) -> None:
    model, cfg = cli.model(flags, models.gpt_oss, other="is not a GPT-OSS; use the recipe of its family")
    tx, schedule, watch = cli.optimizer(flags, model.specs(cfg))  # AdamW under a cosine; what finds bad steps
    coefficient = cfg.router_aux_loss_coef * cfg.output_router_logits if flags.balance is None else flags.balance

    def train_step(state, batch, ops=xtf.LOCAL):
        num_tokens = batch.loss_tokens(ops)  # over the whole global batch, beforehand
        num_routed = moe.num_tokens(batch, ops)                                 # all that is not padding
        before = state.extra["counts"] if flags.balance_over == "batch" else None

        def share(params, batch, ops):  # this rank's, this micro-batch's part of the loss
            nll, routing = model.loss_and_routing(params, batch, cfg, ops)
            balance = moe.balance(routing, num_routed, ops, flags.balance_over, before)
            loss = nll / num_tokens + coefficient * balance + flags.z_loss * moe.z_loss(routing, num_routed)
            return loss, {"nll": nll, **moe.sums(routing)}
        k = len(batch.input_ids) // cli.micro_packs(flags)
        (loss, sums), grads = xtf.microbatch(xtf.value_and_grad(share), k)(state.params, batch, ops)
        norm = ops.norm(grads)
        ok, seen = watch.check(state.extra["guard"], loss, norm)  # False: the step is skipped, on the device
        updates, opt = tx.update(grads, state.opt, state.params, ops, norm=norm, ok=ok)
        extra = {"guard": seen, "counts": sums["counts"]}
        return state.apply(updates, opt, extra), {"loss": sums["nll"] / num_tokens, "grad_norm": norm,
                                                  "lr": schedule(state.taken), **watch.metrics(seen),
                                                  **moe.metrics(sums)}

    step = xtf.shard(train_step, *cli.transforms(flags), mesh=run.mesh, specs=model.specs(cfg))
    if cli.shown(flags, step, cfg.vocab_size):  # --dry-run, --show-batch
        return
    loader, held_out = cli.data(flags, cfg.vocab_size)
    params = cli.load(flags, step, model.names(cfg))
    state = xtf.TrainState.create(params, tx.init(params), {"guard": watch.init(), "counts": moe.no_counts(step.specs)},
                                  flags.seed)
    state = run.begin(state, loader, model, cfg, held_out)  # the newest checkpoint's, if --resume finds one

    for i, batch in run.steps():
        state, metrics = step(state, batch)
        run.log(i, metrics)
        run.evaluate(i, state)
        run.save(i, state)
    run.finish(state.params)


if __name__ == "__main__":
    cli.run(main)
