//! What is done to a pool without the daemon: create. The engine runs here, on a
//! shard of this process; the pool's lock keeps the daemon away meanwhile.

use std::sync::Arc;

use pando_engine::disk::{Allocate, PoolFile};
use pando_engine::error::ErrorKind;
use pando_engine::pool::{FormatOptions, Pool};
use pando_engine::shard::{Shard, ShardHandle};
use pando_engine::units::BLOCK_BYTES;
use uuid::Uuid;

use crate::args::{Allocation, Output, PoolCreateArgs};
use crate::error::{Error, Result};
use crate::{table, view};

fn shard() -> Result<ShardHandle> {
    Ok(Shard::start("offline".to_owned(), || async {})?)
}

/// Makes a file or block device a pool.
pub(crate) async fn create(output: Output, args: PoolCreateArgs) -> Result<()> {
    let exists = args.path.exists();
    let file = Arc::new(if exists { open_existing(&args)? } else { create_file(&args)? });
    let uuid = Uuid::new_v4();
    let options = FormatOptions {
        size_bytes: whole_blocks(args.size.unwrap_or_else(|| file.len_bytes())),
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
        let taken = error.kind() == ErrorKind::Exists;
        let error = Error::from(error.context(format!("pool {shown}")));
        return Err(if taken {
            error.hint("--force overwrites what is there; everything on it is lost")
        } else {
            error
        });
    }
    table::print(output, &created, |pool| {
        format!("pool {0} is ready; serve it with `pandod --pool {0}`", pool.path)
    })
}

fn whole_blocks(bytes: u64) -> u64 {
    bytes - bytes % BLOCK_BYTES
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
    Ok(PoolFile::create(&args.path, whole_blocks(size), allocate)?)
}

fn open_existing(args: &PoolCreateArgs) -> Result<PoolFile> {
    let file = PoolFile::open(&args.path)?;
    match args.size {
        Some(size) if size > file.len_bytes() => Err(Error::new(format!(
            "{} has {} bytes, less than --size",
            args.path.display(),
            file.len_bytes()
        ))
        .hint("leave out --size to use all of it")),
        _ => Ok(file),
    }
}
