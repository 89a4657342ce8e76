"""Run the published configurations in detectron2, which must be installed. See detection/README.md.

    python detection/train_detectron2.py --config-file detection/configs/pascal_voc_R_50_C4_24k_ssc.yaml --num-gpus 8 \
        MODEL.WEIGHTS sc_800ep_train.pkl OUTPUT_DIR runs/voc

The options are those of detectron2's own trainer: --resume, --eval-only, --num-machines, --machine-rank, --dist-url, and
KEY VALUE pairs. The data sets lie in DETECTRON2_DATASETS (default ./datasets).
"""

import sys
from typing import Any


def main() -> None:
    try:
        import detectron2  # noqa: F401
    except ImportError:
        print(
            "train_detectron2.py: error: detectron2 is not installed: install it, or use detection/train.py, which does not need it",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    from detectron2.engine import default_argument_parser, launch

    arguments = default_argument_parser().parse_args()
    launch(
        run,
        arguments.num_gpus,
        num_machines=arguments.num_machines,
        machine_rank=arguments.machine_rank,
        dist_url=arguments.dist_url,
        args=(arguments,),
    )


def register_heads() -> None:
    """Register `Res5ROIHeadsExtraNorm`: the C4 heads with one more normalisation after res5."""
    from detectron2.layers import get_norm
    from detectron2.modeling import ROI_HEADS_REGISTRY, Res5ROIHeads

    @ROI_HEADS_REGISTRY.register()
    class Res5ROIHeadsExtraNorm(Res5ROIHeads):
        @classmethod
        def _build_res5_block(cls, cfg: Any) -> Any:
            blocks, channels = super()._build_res5_block(cfg)
            # as one more part of the same sequence, so that the names of res5 still end as those of the converted file
            blocks.norm = get_norm(cfg.MODEL.RESNETS.NORM, channels)
            return blocks, channels


def run(arguments: Any) -> Any:
    """Train or evaluate on this GPU."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.data import MetadataCatalog
    from detectron2.engine import DefaultTrainer, default_setup
    from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator

    class Trainer(DefaultTrainer):
        @classmethod
        def build_evaluator(cls, cfg: Any, name: str, output_folder: str | None = None) -> Any:
            if MetadataCatalog.get(name).evaluator_type == "coco":
                return COCOEvaluator(name, output_dir=output_folder or f"{cfg.OUTPUT_DIR}/inference")
            return PascalVOCDetectionEvaluator(name)

    register_heads()
    cfg = get_cfg()
    cfg.merge_from_file(arguments.config_file)
    cfg.merge_from_list(arguments.opts)
    cfg.freeze()
    default_setup(cfg, arguments)
    if arguments.eval_only:
        model = Trainer.build_model(cfg)
        DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=arguments.resume)
        return Trainer.test(cfg, model)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=arguments.resume)
    return trainer.train()


if __name__ == "__main__":
    main()
