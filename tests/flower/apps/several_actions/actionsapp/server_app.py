"""Messages by hand: no strategy."""

import json
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    nodes = list(grid.get_node_ids())

    def ask(kind: str, content: RecordDict) -> list[Message]:
        return list(grid.send_and_receive([Message(content, each, kind, group_id="7") for each in nodes]))

    question = RecordDict({"question": ConfigRecord({"big": 2**62, "small": -(2**62)})})
    ask("query", question)
    answers = ask("query", question)
    brain = ArrayRecord({"brain": Array("bfloat16", (2,), "raw", b"\x80\x3f\x00\x40")})
    fast, exact = ask("train.fast", RecordDict()), ask("train.exact", RecordDict({"arrays": brain}))
    missing = ask("train.nonesuch", RecordDict())
    ids = list(grid.push_messages([Message(question, nodes[0], "query")]))
    pulled = []
    while not pulled:
        pulled = list(grid.pull_messages(ids))
    if path := context.run_config["report.path"]:
        told = {
            "partitions": [each.content["config"]["partition"] for each in answers],
            "times": [each.content["config"]["times"] for each in answers],
            "echo": [dict(each.content["echo"]) for each in answers],
            "texts": [list(each.content["config"]["texts"]) for each in answers],
            "bytes": [each.content["config"]["bytes"].hex() for each in answers],
            "groups": [each.metadata.group_id for each in answers],
            "sources": [each.metadata.src_node_id for each in answers] == nodes,
            "values": [each.content["metrics"]["value"] for each in fast],
            "brains": [each.content["arrays"]["brain"].data.hex() for each in exact],
            "missing": [(each.error.code, each.error.reason) for each in missing],
            "pulled": [each.content["config"]["times"] for each in pulled],
        }
        Path(path).write_text(json.dumps(told))
