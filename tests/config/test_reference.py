"""The page of settings is the schema."""

from pathlib import Path

from omegaconf import OmegaConf

from megatron_avatar.config import reference
from megatron_avatar.config.schema import Config

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_page_is_of_today():
    assert PAGE.read_text() == reference.markdown(), "python -m megatron_avatar.config.reference > docs/settings.md"


def test_every_setting_is_there_with_its_default():
    named = {s.key: s for _, _, settings in reference.sections() for s in settings}
    plain = OmegaConf.to_container(OmegaConf.structured(Config))

    def leaves(tree, prefix=""):
        for name, value in tree.items():
            if isinstance(value, dict) and value and f"{prefix}{name}" not in named:
                yield from leaves(value, f"{prefix}{name}.")
            elif f"{prefix}{name}" != "stages":
                yield f"{prefix}{name}", value

    found = dict(leaves(plain))
    assert {key for key in named if ".NAME." not in key} == set(found)
    assert named["rl.beta"].default == str(found["rl.beta"]) and named["model.path"].default == '""'
    assert "stages.NAME.steps" in named and named["rl.n_on"].kind == "int"


def test_a_key_prints_its_settings(capsys):
    assert reference.main(["rl.replay.li"]) == 0
    assert capsys.readouterr().out.startswith("rl.replay.live=true  (bool) draw only")
    assert reference.main(["nothing"]) == 2
