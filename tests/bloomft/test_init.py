"""What importing the package loads and changes."""

from tests.bloomft.python_process import run_python


def loaded_by(statement: str) -> set[str]:
    """The names of all modules in a fresh process after ``statement``."""
    return set(run_python("-c", f"import sys; {statement}; print(*sys.modules)").split())


def test_the_package_alone_loads_neither_torch_nor_transformers():
    loaded = loaded_by("import bloomft")
    assert "bloomft" in loaded
    assert not loaded & {"torch", "transformers"}


def test_patching_loads_neither_the_data_pipeline_nor_what_runs_a_training():
    loaded = loaded_by("from bloomft import patch_bloom")
    assert "bloomft.model.patch" in loaded
    assert not [name for name in loaded if name.startswith(("bloomft.data", "bloomft.run"))]


def test_importing_changes_no_environment_variable():
    code = "import os; before = dict(os.environ); import bloomft.model.patch; assert os.environ == before"
    run_python("-c", code)
