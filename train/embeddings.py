"""Rows in a base's embeddings for tokens that were added to its vocabulary."""

from pathlib import Path


def add_rows(folder: Path, added: list[int]) -> None:
    """Rewrite a model folder's weights with a row for each added id, in tied embeddings once.

    A new row is the mean of the old ones, so that the base's own answers hardly change before it is trained
    (https://nlp.stanford.edu/~johnhew/vocab-expansion.html). A base may have had rows to spare: they are overwritten.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    rows = max(model.get_input_embeddings().weight.shape[0], max(added) + 1)
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
            embeddings.weight[added] = embeddings.weight[: min(added)].float().mean(0).to(embeddings.weight.dtype)
    for file in folder.glob("*.safetensors*"):
        file.unlink()  # it may be the user's own file under another name
    model.save_pretrained(folder)
