"""`python -m benchmarks.profile`: where the time of a local step goes, by PyTorch's operators, with dropout off."""

from torch.profiler import ProfilerActivity, profile

from benchmarks.setup import dropout, make
from benchmarks.table import percentages
from peertune.method import standing
from peertune.rounds.training import train_local

STEPS = 10
KINDS = {
    "products with the base's and the adapters' weights": ("aten::mm", "aten::addmm"),
    "attention's products": ("aten::bmm",),
    "copies, casts and packing": ("aten::copy_", "aten::index_select", "aten::index_copy", "aten::fill_", "aten::cat"),
    "GELU": ("aten::gelu", "aten::gelu_backward"),
    "softmax": ("aten::_softmax", "aten::_softmax_backward_data"),
    "layer norms": ("aten::native_layer_norm", "aten::native_layer_norm_backward"),
    "sums and scalings": ("aten::add", "aten::add_", "aten::mul", "aten::mul_"),
}


def main() -> None:
    """Profile ten steps after three, on the CPU, and print each kind's share."""
    job = make("algorithm.name=dec_lora", "training.local_steps=1", *dropout(False)).job
    state, phase = job.state.clone(), job.algorithm.phase(0)

    def steps(first: int, count: int) -> None:
        for step in range(first, first + count):
            train_local(
                job.model,
                state,
                job.steps(job.clients, [step] * len(job.clients)),
                phase,
                job.optim,
                standing(job.clients, state.at(step).rounds),
            )

    steps(0, 3)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        steps(3, STEPS)
    taken = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    parts = {name: sum(taken.get(key, 0) for key in keys) for name, keys in KINDS.items()}
    print(percentages(parts, sum(taken.values()) - sum(parts.values())))


if __name__ == "__main__":
    main()
