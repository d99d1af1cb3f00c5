"""Package layout: top-level folders are mapped into the import package; the rest is in pyproject.toml."""

from setuptools import find_packages, setup

MAPPED = {
    "tvm_vitq.relax_passes": "relax_passes",
    "tvm_vitq.schedules": "schedules",
    "tvm_vitq.tuning_logs": "tuning_logs",
    "tvm_vitq.deploy": "runtime",
}

setup(
    packages=find_packages(include=["tvm_vitq", "tvm_vitq.*"]) + list(MAPPED),
    package_dir=MAPPED,
    include_package_data=False,  # only what package_data names; folders of data are no packages
    package_data={
        "tvm_vitq": ["py.typed"],
        "tvm_vitq.refmodels": ["data/*"],
        "tvm_vitq.tuning_logs": ["**/*.jsonl"],
        "tvm_vitq.deploy": ["*.cc", "*.h", "*.md", "CMakeLists.txt"],
    },
)
