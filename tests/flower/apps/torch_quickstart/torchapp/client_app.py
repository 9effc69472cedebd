"""A node trains for an epoch, in batches of its own order."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch.nn.functional import cross_entropy

from torchapp.task import Net, load_data

app = ClientApp()


def begin(message: Message, context: Context) -> tuple[Net, torch.Tensor, torch.Tensor]:
    model = Net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    config = context.node_config
    return model, *load_data(int(config["partition-id"]), int(config["num-partitions"]))


@app.train()
def train(message: Message, context: Context) -> Message:
    model, pixels, labels = begin(message, context)
    optimizer = torch.optim.SGD(model.parameters(), lr=message.content["config"]["lr"], momentum=0.9)
    for own in torch.arange(len(labels)).split(32):
        optimizer.zero_grad()
        loss = cross_entropy(model(pixels[own]), labels[own])
        loss.backward()
        optimizer.step()
    metrics = MetricRecord({"train_loss": loss.item(), "num-examples": len(labels)})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    model, pixels, labels = begin(message, context)
    with torch.no_grad():
        output = model(pixels)
    right = (output.argmax(1) == labels).float().mean().item()
    metrics = {
        "eval_loss": cross_entropy(output, labels).item(),
        "eval_acc": right,
        "num-examples": len(labels),
    }
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)
