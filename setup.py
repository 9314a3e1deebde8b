"""One file beside the packages: the line that Python runs at its start, so that CLOUD=1 is heard.

All else is in pyproject.toml. A ``.pth`` file must lie in the folder of packages itself, for which
setuptools has no setting; an installation of data files goes through here in wheels and in editable
installs alike, and is sent there.
"""

# setuptools first: it is where distutils comes from since Python 3.12.
from setuptools import Distribution, setup  # isort: skip
from distutils.command.install_data import install_data  # isort: skip


class InstallBesidePackages(install_data):
    """Installs data files into the folder of packages."""

    def finalize_options(self) -> None:
        """See distutils."""
        self.set_undefined_options(
            "install", ("install_lib", "install_dir"), ("root", "root"), ("force", "force")
        )


class DistributionWithData(Distribution):
    """An editable installation asks whether there is "data" by a name that nothing else has."""

    def has_data(self) -> bool:
        """Whether there are data files."""
        return bool(self.has_data_files())


setup(
    distclass=DistributionWithData,
    cmdclass={"install_data": InstallBesidePackages},
    data_files=[("", ["p2pflop_cloud.pth"])],
)
