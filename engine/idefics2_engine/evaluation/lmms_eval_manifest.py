"""What lmms-eval finds by the entry point ``lmms_eval.models``: the names of the classes."""

from lmms_eval.models.registry_v2 import ModelManifest

_MODULE = "idefics2_engine.evaluation.lmms_eval_model"

MANIFEST = ModelManifest(
    model_id="idefics2_engine",
    chat_class_path=f"{_MODULE}.Idefics2EngineChat",
    simple_class_path=f"{_MODULE}.Idefics2EngineSimple",
)
