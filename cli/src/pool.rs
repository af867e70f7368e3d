//! The commands on the pool.

use pando_engine::units::{BLOCK_BYTES, to_u64};
use pando_proto::v1::{
    PoolCheckRequest, PoolDumpRequest, PoolGrowRequest, PoolScrubRequest, PoolStatusRequest,
    pool_check_response, pool_scrub_response,
};

use crate::args::Output;
use crate::client::Client;
use crate::error::{Error, Result};
use crate::table;
use crate::view::{Check, Finding, Pool, Scrub, ScrubError};

/// Shows the state of the pool.
pub(crate) async fn status(mut client: Client, output: Output) -> Result<()> {
    let answer = client.pool_status(PoolStatusRequest {}).await?.into_inner();
    table::print(output, &Pool::from(answer), table::pool)
}

/// Makes the pool larger.
pub(crate) async fn grow(mut client: Client, output: Output, size: Option<u64>) -> Result<()> {
    let request = PoolGrowRequest { size_bytes: size.unwrap_or(0) };
    let answer = client.pool_grow(request).await?.into_inner();
    table::print(output, &Pool::from(answer.pool.unwrap_or_default()), table::pool)
}

/// Checks the pool that the daemon has open.
pub(crate) async fn check(mut client: Client, output: Output) -> Result<()> {
    let mut events = client.pool_check(PoolCheckRequest {}).await?.into_inner();
    let bar = table::steps();
    let mut check = Check::default();
    let mut complete = false;
    while let Some(answer) = events.message().await? {
        match answer.event {
            Some(pool_check_response::Event::Progress(progress)) => {
                bar.set_length(progress.total);
                bar.set_position(progress.done);
            }
            Some(pool_check_response::Event::Finding(finding)) => check.findings.push(Finding {
                code: finding.code,
                kind: finding.kind,
                what: finding.what,
            }),
            Some(pool_check_response::Event::Summary(summary)) => {
                check.generation = summary.generation;
                check.nodes = summary.nodes;
                check.data_blocks = summary.data_blocks;
                check.omitted = summary.findings.saturating_sub(to_u64(check.findings.len()));
                complete = true;
            }
            None => {}
        }
    }
    bar.finish_and_clear();
    if complete { report(output, &check) } else { Err(ended_early("check")) }
}

/// Prints the result of a check; a finding makes it a failure.
pub(crate) fn report(output: Output, check: &Check) -> Result<()> {
    let count = to_u64(check.findings.len()) + check.omitted;
    table::print(output, check, |check| {
        let findings: String = check
            .findings
            .iter()
            .map(|finding| format!("{} {}: {}\n", finding.code, finding.kind, finding.what))
            .collect();
        format!(
            "{findings}generation {}: {} nodes and {} data blocks checked, {count} findings",
            check.generation, check.nodes, check.data_blocks
        )
    })?;
    match count {
        0 => Ok(()),
        _ => Err(Error::new(format!("the check has {count} findings")).hint(
            "export the volumes that can be read (`pando volume export`) before anything else",
        )),
    }
}

/// Verifies the checksums of all data.
pub(crate) async fn scrub(mut client: Client, output: Output, rate: Option<u64>) -> Result<()> {
    let request = PoolScrubRequest { rate_bytes: rate.unwrap_or(0) };
    let mut events = client.pool_scrub(request).await?.into_inner();
    let bar = table::progress(Some(0));
    let mut scrub = Scrub::default();
    let mut complete = false;
    while let Some(answer) = events.message().await? {
        match answer.event {
            Some(pool_scrub_response::Event::Progress(progress)) => {
                bar.set_length(progress.total * BLOCK_BYTES);
                bar.set_position(progress.done * BLOCK_BYTES);
            }
            Some(pool_scrub_response::Event::Error(error)) => {
                scrub.errors.push(ScrubError { block: error.block, what: error.what });
            }
            Some(pool_scrub_response::Event::Summary(summary)) => {
                scrub.blocks = summary.blocks;
                complete = true;
            }
            None => {}
        }
    }
    bar.finish_and_clear();
    if !complete {
        return Err(ended_early("scrub"));
    }
    table::print(output, &scrub, |scrub| {
        let errors: String = scrub
            .errors
            .iter()
            .map(|error| format!("block {}: {}\n", error.block, error.what))
            .collect();
        let size = table::size(scrub.blocks * BLOCK_BYTES);
        format!("{errors}{size} in use verified, {} blocks wrong", scrub.errors.len())
    })?;
    match scrub.errors.len() {
        0 => Ok(()),
        count => Err(Error::new(format!("{count} blocks do not hold what was written")).hint(
            "`pando volume export` of each volume tells which are concerned; restore those \
             from a backup and look at the health of the device",
        )),
    }
}

/// Prints the structures of the pool that the daemon has open.
pub(crate) async fn dump(mut client: Client, output: Output) -> Result<()> {
    let request = PoolDumpRequest { json: output == Output::Json };
    let mut pieces = client.pool_dump(request).await?.into_inner();
    let mut text = String::new();
    while let Some(piece) = pieces.message().await? {
        text.push_str(&piece.text);
    }
    table::print_text(&text)
}

fn ended_early(what: &str) -> Error {
    Error::new(format!("the {what} ended before its result")).hint("is pandod still running?")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_are_failures() {
        let sound = Check { generation: 3, ..Check::default() };
        report(Output::Table, &sound).unwrap();
        let finding = Finding {
            code: "K4".to_owned(),
            kind: "refcount_low".to_owned(),
            what: "block 7: counted 1, named 2 times".to_owned(),
        };
        let damaged = Check { findings: vec![finding], ..sound };
        let text = report(Output::Json, &damaged).unwrap_err().to_string();
        assert!(text.starts_with("error: the check has 1 findings\nhint: "), "{text}");
    }
}
