//! What is done to a pool without the daemon: create, check, dump. The engine runs here, on a
//! shard of this process; the pool's lock keeps the daemon away meanwhile.

use std::fs::DirBuilder;
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use pando_engine::disk::{Allocate, Disk, PoolFile};
use pando_engine::error;
use pando_engine::pool::{DumpForm, FormatOptions, Pool, check_offline, dump_offline};
use pando_engine::runtime::shard::{Shard, ShardHandle};
use pando_engine::units::Size;
use uuid::Uuid;

use crate::args::{Allocation, Output, PoolCreateArgs};
use crate::error::{Error, Result};
use crate::{pool, table, view};

/// The directory of pools in files, as the service makes it (`StateDirectory`).
const STATE_DIR: &str = "/var/lib/pando";

fn shard() -> Result<ShardHandle> {
    Ok(Shard::start("offline".to_owned(), || async {})?)
}

/// Makes a file or block device a pool.
pub(crate) async fn create(output: Output, args: PoolCreateArgs) -> Result<()> {
    let exists = args.path.exists();
    let file = Arc::new(if exists { open_existing(&args)? } else { create_file(&args)? });
    let uuid = Uuid::new_v4();
    let options = FormatOptions {
        size_bytes: args.size.unwrap_or_else(|| file.len_bytes()),
        journal_bytes: args.journal,
        force: args.force,
        uuid: *uuid.as_bytes(),
    };
    let created = view::CreatedPool {
        path: args.path.display().to_string(),
        uuid: uuid.to_string(),
        size_bytes: options.size_bytes,
    };
    let formatted = shard()?.call(move || async move {
        let disk = file.disk();
        Pool::format(&disk, &options).await
    });
    if let Err(error) = formatted.await.and_then(|result| result) {
        if !exists {
            // Ours, and no pool: the failure is the one to tell.
            std::fs::remove_file(&args.path).unwrap_or_default();
        }
        let shown = args.path.display();
        return Err(error.context(format!("pool {shown}")).into());
    }
    table::print(output, &created, |pool| {
        format!("pool {0} is ready; serve it with `pandod --pool {0}`", pool.path)
    })
}

/// Makes the directory of the pool, if it is `state_dir` and missing: the first pool of a machine
/// needs it before the service has run.
fn make_state_dir(pool: &Path, state_dir: &Path) -> Result<()> {
    if pool.parent() != Some(state_dir) {
        return Ok(());
    }
    match DirBuilder::new().mode(0o700).create(state_dir) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => {
            Err(Error::io(format!("creation of directory {}", state_dir.display()), &error))
        }
        _ => Ok(()),
    }
}

fn create_file(args: &PoolCreateArgs) -> Result<PoolFile> {
    let shown = args.path.display();
    let Some(size) = args.size else {
        return Err(Error::new(format!("{shown} does not exist and no size is given for it"))
            .hint(format!("pando pool create {shown} --size 10GiB")));
    };
    let allocate = match args.allocate {
        Allocation::Sparse => Allocate::Sparse,
        Allocation::Reserve => Allocate::Reserve,
        Allocation::Write => Allocate::Write,
    };
    // Before there is a file of this size.
    let options = FormatOptions {
        size_bytes: size,
        journal_bytes: args.journal,
        force: args.force,
        uuid: [0; 16],
    };
    options.check().map_err(|error| error.context(format!("pool {shown}")))?;
    make_state_dir(&args.path, Path::new(STATE_DIR))?;
    Ok(PoolFile::create(&args.path, options.size_bytes, allocate)?)
}

fn open_existing(args: &PoolCreateArgs) -> Result<PoolFile> {
    let file = PoolFile::open(&args.path)?;
    match args.size {
        Some(size) if size > file.len_bytes() => Err(Error::new(format!(
            "{} has {}, less than --size",
            args.path.display(),
            Size(file.len_bytes())
        ))
        .hint("leave out --size to use all of it")),
        _ => Ok(file),
    }
}

/// Lets `work` look at the pool at `path`. Nothing is written: the journal is not replayed.
async fn look<R, F>(path: &Path, work: F) -> Result<R>
where
    F: AsyncFnOnce(&Rc<dyn Disk>) -> error::Result<R> + Send + 'static,
    R: Send + 'static,
{
    let file = Arc::new(PoolFile::open(path).map_err(|error| match error.kind() {
        error::ErrorKind::Busy => {
            error.hint("if pandod runs on it, leave out --offline, or stop pandod")
        }
        _ => error,
    })?);
    let done = shard()?.call(move || async move { work(&file.disk()).await });
    let done = done.await.and_then(|result| result);
    done.map_err(|error| Error::from(error.context(format!("pool {}", path.display()))))
}

/// Checks the pool at `path`.
pub(crate) async fn check(path: &Path, output: Output) -> Result<()> {
    let bar = table::steps();
    let shown = bar.clone();
    let report = look(path, async move |disk: &Rc<dyn Disk>| {
        let progress = |done, total| {
            shown.set_length(total);
            shown.set_position(done);
        };
        check_offline(disk, &progress).await
    });
    let report = report.await;
    bar.finish_and_clear();
    pool::report(output, &view::Check::from(report?))
}

/// Prints the structures of the pool at `path`.
pub(crate) async fn dump(path: &Path, output: Output) -> Result<()> {
    let form = match output {
        Output::Table => DumpForm::Text,
        Output::Json => DumpForm::Json,
    };
    look(path, async move |disk: &Rc<dyn Disk>| {
        let mut out = std::io::BufWriter::new(std::io::stdout());
        dump_offline(disk, form, &mut out).await
    })
    .await
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn only_the_state_directory_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let state_dir = dir.path().join("pando");
        make_state_dir(&dir.path().join("other/pool"), &state_dir).unwrap();
        make_state_dir(&state_dir.join("more/pool"), &state_dir).unwrap();
        assert!(!state_dir.exists());
        for _ in 0..2 {
            make_state_dir(&state_dir.join("pool"), &state_dir).unwrap();
            assert_eq!(state_dir.metadata().unwrap().permissions().mode() & 0o777, 0o700);
        }
        let missing = dir.path().join("missing/pando");
        let error = make_state_dir(&missing.join("pool"), &missing).unwrap_err().to_string();
        assert!(error.contains("missing/pando"), "{error}");
    }
}
