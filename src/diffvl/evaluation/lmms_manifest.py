"""What lmms-eval finds under the entry point `lmms_eval.models`: the name of the model and where its classes are.

It is read whenever lmms-eval starts, for whatever model, so nothing else is imported.
"""

from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]  (extra `eval`)

MANIFEST = ModelManifest(
    model_id="diffvl",
    simple_class_path="diffvl.evaluation.lmms.DiffVLSimple",
    chat_class_path="diffvl.evaluation.lmms.DiffVLChat",
)
