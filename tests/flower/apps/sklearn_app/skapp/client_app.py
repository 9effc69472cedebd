"""One iteration of fitting, and log loss and accuracy on what was held back."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from sklearn.metrics import log_loss

from skapp.task import get_arrays, load_data, new_model, set_arrays

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    model = set_arrays(new_model(), message.content["arrays"].to_numpy_ndarrays())
    config = context.node_config
    x, y, _, _ = load_data(int(config["partition-id"]), int(config["num-partitions"]))
    model.fit(x, y)
    metrics = {"num-examples": len(y), "train_loss": log_loss(y, model.predict_proba(x))}
    content = {"arrays": ArrayRecord(get_arrays(model)), "metrics": MetricRecord(metrics)}
    return Message(RecordDict(content), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    model = set_arrays(new_model(), message.content["arrays"].to_numpy_ndarrays())
    config = context.node_config
    _, _, x, y = load_data(int(config["partition-id"]), int(config["num-partitions"]))
    metrics = {
        "num-examples": len(y),
        "test_loss": log_loss(y, model.predict_proba(x)),
        "accuracy": float(model.score(x, y)),
    }
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)
