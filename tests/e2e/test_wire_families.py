"""Any architecture as student of a CNN and of a ViT: its stages are found, a method is proposed, every term of it teaches, and the YAML loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekd.api import wire
from edgekd.recipe import load

TEACHERS = {
    "cnn": "{arch: resnet10t, args: {channels: [16, 16, 32, 32]}, train: {epochs: 1}}",
    "vit": "{arch: vit_tiny_patch16_224, args: {img_size: SIZE, embed_dim: 48, num_heads: 3, depth: 4}, train: {epochs: 1}}",
}
TWELVE = {  # architecture: image size, arguments, family, stages; one of each kind, small
    "resnet10t": (64, "", "cnn", 4),
    "mobilenetv3_small_050": (64, "", "cnn", 4),
    "convnext_atto": (64, "", "cnn", 4),
    "repvgg_a0": (64, "", "cnn", 4),
    "poolformer_s12": (64, "", "cnn", 4),
    "shvit_s1": (96, "", "cnn", 3),
    "vit_tiny_patch16_224": (64, "img_size: 64, depth: 4", "vit", 4),
    "deit_tiny_distilled_patch16_224": (64, "img_size: 64, depth: 4", "vit", 4),
    "swin_tiny_patch4_window7_224": (
        64,
        "img_size: 64, window_size: 4, embed_dim: 24, depths: [1, 1, 2, 1], num_heads: [1, 2, 3, 4]",
        "swin",
        4,
    ),
    "levit_128s": (128, "img_size: 128", "swin", 3),
    "coat_lite_tiny": (64, "img_size: 64", "swin", 4),
    "mixer_s32_224": (64, "img_size: 64", "mlp", 4),
}
ALL = {  # architecture: image size
    "resnet18": 96, "resnext26ts": 128, "seresnet18": 96, "legacy_seresnet18": 96, "skresnet18": 96, "resnest14d": 96, "resnetblur18": 96, "resnetv2_50": 96,
    "res2net50_14w_8s": 96, "bat_resnext26ts": 256, "lambda_resnet26t": 256, "halonet26t": 256, "botnet26t_256": 256, "regnety_002": 96, "regnetx_002": 96,
    "densenet121": 96, "vgg11": 64, "inception_v3": 128, "xception41": 128, "dpn48b": 96, "dla34": 96, "hrnet_w18_small": 96, "selecsls42": 96, "darknet53": 96,
    "cspdarknet53": 96, "cspresnet50": 96, "ese_vovnet19b_slim": 96, "gernet_s": 96, "tresnet_m": 128, "eca_nfnet_l0": 96, "hgnet_tiny": 96, "hgnetv2_b0": 96,
    "mobilenetv1_100": 96, "mobilenetv2_050": 96, "mobilenetv4_conv_small": 96, "mobilenetv4_hybrid_medium": 128, "mobileone_s0": 96, "mnasnet_small": 96,
    "semnasnet_075": 96, "hardcorenas_a": 96, "fbnetc_100": 96, "spnasnet_100": 96, "lcnet_050": 96, "tinynet_e": 96, "ghostnet_050": 96, "ghostnetv2_100": 96,
    "efficientnet_b0": 96, "efficientnet_lite0": 96, "tf_efficientnetv2_b0": 96, "rexnetr_100": 96, "rdnet_tiny": 96, "starnet_s1": 96, "fasternet_t0": 96,
    "convnextv2_atto": 96, "inception_next_atto": 96, "convmixer_768_32": 64, "edgenext_xx_small": 128, "mobilevit_xxs": 128, "mobilevitv2_050": 128,
    "fastvit_t8": 128, "repvit_m0_9": 96, "efficientvit_b0": 128, "efficientvit_m0": 224, "swiftformer_xs": 224, "efficientformer_l1": 224,
    "efficientformerv2_s0": 224, "caformer_s18": 96, "convformer_s18": 96, "coatnet_nano_rw_224": 224, "maxvit_tiny_rw_224": 224, "nest_tiny": 224,
    "focalnet_tiny_srf": 128, "davit_tiny": 128, "gcvit_xxtiny": 224, "nextvit_small": 128, "pvt_v2_b0": 128, "tiny_vit_5m_224": 224, "visformer_tiny": 224,
    "pit_ti_224": 224, "deit_tiny_patch16_224": 224, "deit3_small_patch16_224": 224, "vit_relpos_small_patch16_224": 224, "vit_tiny_r_s16_p8_224": 224,
    "eva02_tiny_patch14_224": 224, "vitamin_small_224": 224, "cait_xxs24_224": 224, "xcit_nano_12_p16_224": 224, "tnt_s_patch16_224": 224, "convit_tiny": 224,
    "crossvit_tiny_240": 240, "volo_d1_224": 224, "twins_svt_small": 224, "twins_pcpvt_small": 224, "coat_tiny": 224, "hiera_tiny_224": 224, "mvitv2_tiny": 224,
    "swinv2_tiny_window8_256": 256, "sequencer2d_s": 224, "mambaout_femto": 96, "resmlp_12_224": 224, "gmlp_ti16_224": 224,
}  # fmt: skip


def wired(folder: Path, teacher: str, student: str, size: int, args: str = "") -> tuple[str, int]:
    """Checks one pair; returns the student's family and how many stages it has."""
    told = TEACHERS[teacher].replace("SIZE", str(size // 16 * 16))
    head = f"version: 1\ndata: {{format: digits, image_size: {size}}}\nteacher: {told}\nmodel: {{arch: {student}, args: {{{args}}}}}\n"
    (folder / "r.yaml").write_text(head + "stages:\n  - distill: {method: auto, epochs: 2}\n")
    found = wire(str(folder / "r.yaml"), classes=10)
    family, stages = found["models"][1]["family"], [row["stage"] for row in found["stages"]]
    assert stages == list(range(5 - len(stages), 5))
    assert len(stages) >= 2
    assert [row["teacher stage"] for row in found["stages"]].count(None) == max(len(stages) - 4, 0)
    expected = {("cnn", "cnn"): "dkd", ("vit", "vit"): "kd", ("vit", "swin"): "kd"}.get((teacher, family), "ofa")
    assert found["methods"][0]["method"] == expected
    assert [row for row in found["terms"] if not (row["student"] and row["teacher"])] == []
    if expected == "ofa":
        assert [row["student"] for row in found["terms"]] == ["logits", *(f"stage {n}" for n in stages)]
    assert found["warnings"] == [w for w in found["warnings"] if "times the student's parameters" in w]
    (folder / "pasted.yaml").write_text(f"{head}{found['yaml']}\n")
    assert load(str(folder / "pasted.yaml")).stages[0][1].method == expected
    return family, len(stages)


@pytest.mark.parametrize("student", TWELVE)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_twelve_kinds_of_students_are_wired_to_a_cnn_and_to_a_vit(teacher: str, student: str, tmp_path: Path) -> None:
    size, args, family, stages = TWELVE[student]
    assert wired(tmp_path, teacher, student, size, args) == (family, stages)


@pytest.mark.slow
@pytest.mark.parametrize("student", ALL)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_every_family_is_wired_to_a_cnn_and_to_a_vit(teacher: str, student: str, tmp_path: Path) -> None:
    wired(tmp_path, teacher, student, ALL[student])
