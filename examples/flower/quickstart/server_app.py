"""FedAvg, of which the server keeps every client's snapshots."""

import json
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from dlm_core import flower
from quickstart import task

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds; keep the snapshots, and the accuracy after each round."""
    kept = Path(str(context.run_config["kept"]))
    clients = len(task.CLIENTS)
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
    strategy = flower.keeping(strategy, kept, clients="all", rounds="all")
    torch.manual_seed(0)
    found: list[float] = []

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        net = task.Net()
        net.load_state_dict(arrays.to_torch_state_dict())
        found.append(task.accuracy(net))
        return MetricRecord({"accuracy": found[-1]})

    strategy.start(
        grid,
        ArrayRecord(task.Net().state_dict()),
        num_rounds=int(context.run_config["num-rounds"]),
        evaluate_fn=evaluate,
    )
    (kept / "federation.json").write_text(json.dumps({"accuracy": found}) + "\n")
