"""What a client does in a round."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from dlm_core import defenses
from quickstart import task

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the weights that came, and send what they became."""
    partition = int(context.node_config["partition-id"])
    net = task.Net()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    before = [w.detach().clone() for w in net.parameters()]
    mine = task.load(partition, int(context.run_config["many"]))
    number = int(message.content["config"]["server-round"])
    seed = 100 * number + partition
    loss = task.train(net, mine, seed)
    clip, noise = (float(context.run_config[name]) for name in ("clip", "noise"))
    if clip:
        update = [w0 - w.detach() for w0, w in zip(before, net.parameters())]
        hidden = defenses.clip_and_noise(update, clip=clip, noise_multiplier=noise, seed=seed)
        for w, w0, moved in zip(net.parameters(), before, hidden):
            w.data = w0 - moved
    numbers = {"loss": loss, "num-examples": len(mine.images), "partition-id": partition}
    content = {"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord(numbers)}
    return Message(RecordDict(content), reply_to=message)
