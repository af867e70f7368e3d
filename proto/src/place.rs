//! Where the daemon and its clients on one machine meet if nothing else is configured.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The run directory of root.
const SYSTEM: &str = "/run/pando";

/// The run directory of this process's user: `/run/pando` for root, else `$XDG_RUNTIME_DIR/pando`.
/// There is no third choice: a directory in `/tmp` could be made by another user first, and what
/// cleans `/tmp` would remove the memory of a journal that is in use.
///
/// # Errors
/// A message: the user is not root and `XDG_RUNTIME_DIR` is not set.
pub fn run_dir() -> Result<PathBuf, String> {
    let root = rustix::process::geteuid().is_root();
    run_dir_of(root, std::env::var_os("XDG_RUNTIME_DIR"))
}

fn run_dir_of(root: bool, runtime: Option<OsString>) -> Result<PathBuf, String> {
    if root {
        return Ok(PathBuf::from(SYSTEM));
    }
    // The specification of the variable requires that relative paths are ignored.
    let runtime = runtime.map(PathBuf::from).filter(|path| path.is_absolute());
    runtime.map(|path| path.join("pando")).ok_or_else(|| {
        "there is no default run directory: XDG_RUNTIME_DIR is not set to an absolute path"
            .to_owned()
    })
}

/// The socket of the API in the run directory `run_dir`.
#[must_use]
pub fn socket_in(run_dir: &Path) -> PathBuf {
    run_dir.join("pando.sock")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_has_the_systems_directory_and_users_their_own() {
        let runtime = |path: &str| Some(OsString::from(path));
        assert_eq!(run_dir_of(true, None).unwrap(), Path::new("/run/pando"));
        assert_eq!(run_dir_of(true, runtime("/run/user/0")).unwrap(), Path::new("/run/pando"));
        let own = run_dir_of(false, runtime("/run/user/1000")).unwrap();
        assert_eq!(own, Path::new("/run/user/1000/pando"));
        for missing in [None, runtime(""), runtime("run")] {
            assert!(run_dir_of(false, missing).unwrap_err().contains("XDG_RUNTIME_DIR"));
        }
    }
}
