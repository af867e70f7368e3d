//! `pando-kubernetes`: Pando with a real Kubernetes on one machine, started by `scripts/kubernetes`
//! in namespaces of its own.
//!
//! ```text
//! cluster   store, API, controllers, scheduler      storage   a pool and its daemon
//! kubelet   a node that runs pods                   process   a program that runs
//! kubectl   the client                              objects   what users write
//! control   claims, clones, snapshots of two nodes, without pods
//! pods      deploy/kubernetes as it is, pods on volumes
//! database  PostgreSQL under load, cloned, rolled back, grown
//! ```

#![forbid(unsafe_code)]

mod cluster;
mod control;
mod database;
mod kubectl;
mod kubelet;
mod node;
mod objects;
mod pods;
mod process;
mod report;
mod storage;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use crate::cluster::{Cluster, Places};
use crate::node::{NODE, Node};
use crate::report::Report;

/// Proves Pando with a real Kubernetes.
#[derive(Debug, Parser)]
#[command(name = "pando-kubernetes", max_term_width = 100)]
struct Args {
    /// What scripts/kubernetes-build has made
    #[arg(long)]
    kubernetes: PathBuf,
    /// What scripts/kubernetes-images has made
    #[arg(long)]
    images: PathBuf,
    /// Directory for everything that the cluster keeps
    #[arg(long)]
    state: PathBuf,
    /// Group of processes for those of pods
    #[arg(long)]
    cgroup: String,
    /// Only the parts whose names contain this: control, pods, database
    #[arg(long, default_value = "")]
    only: String,
}

fn main() -> ExitCode {
    let mut report = Report::new();
    let outcome = run(Args::parse(), &mut report);
    let failed = report.close(outcome);
    if failed.unwrap_or(true) { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// All that was asked for.
fn run(args: Args, report: &mut Report) -> Result<()> {
    let places = Places {
        kubernetes: args.kubernetes,
        images: args.images,
        state: args.state,
        manifests: Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kubernetes"),
        cgroup: args.cgroup,
    };
    let mut cluster = Cluster::start(&places, &[NODE])?;
    report.case("the manifests are taken by the API", || {
        for file in ["driver.yaml", "classes.yaml"] {
            let path = places.manifests.join(file);
            cluster.kubectl.run(&["apply", "-f", &path.display().to_string()])?;
        }
        let version = cluster.kubectl.json(&["version"])?;
        Ok(format!("Kubernetes {}", version["serverVersion"]["gitVersion"]))
    })?;
    if "control".contains(&args.only) {
        control::run(&places, &cluster, report)?;
    }
    if ["pods", "database"].iter().any(|part| part.contains(&args.only)) {
        let kubectl = cluster.kubectl.clone();
        let mut node = Node::start(&places, &kubectl, report)?;
        if "pods".contains(&args.only) {
            pods::run(&mut node, report)?;
        }
        if "database".contains(&args.only) {
            database::run(&node, report)?;
        }
    }
    cluster.alive()
}
