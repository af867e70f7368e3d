//! The CSI adapter: see the crate `pando_csi`.

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use pando_csi::config::Config;

/// Offers volumes of a Pando pool to Kubernetes through the Container Storage Interface.
///
/// Requires --node-id, here or in the configuration file; options override the file. Stops on
/// SIGTERM, after the calls that are under way. Exit codes: 0 success, 1 failure, 2 wrong usage.
#[derive(Debug, Parser)]
#[command(name = "pando-csi", version, max_term_width = 100)]
struct Args {
    /// Configuration file (TOML)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Socket of the driver; its name ends in .sock, and unix://PATH is accepted
    #[arg(long, value_name = "PATH", env = "CSI_ENDPOINT", value_parser = endpoint)]
    endpoint: Option<PathBuf>,
    /// Socket of pandod
    #[arg(long, value_name = "PATH")]
    daemon_socket: Option<PathBuf>,
    /// Name of this node in Kubernetes
    #[arg(long, value_name = "NAME")]
    node_id: Option<String>,
    /// Name of the driver in StorageClasses
    #[arg(long, value_name = "NAME")]
    driver_name: Option<String>,
    /// Directory in which kubelet looks for drivers
    #[arg(long, value_name = "DIR")]
    registration_dir: Option<PathBuf>,
    /// Path of the driver's socket as kubelet sees it, if different
    #[arg(long, value_name = "PATH")]
    kubelet_endpoint: Option<PathBuf>,
    /// Address of /healthz and /readyz
    #[arg(long, value_name = "ADDRESS:PORT")]
    health_address: Option<SocketAddr>,
    /// Check the configuration and exit
    #[arg(long)]
    check_config: bool,
}

impl Args {
    fn configuration(self) -> Result<Config> {
        let mut config = match &self.config {
            Some(path) => Config::load(path)?,
            None => Config::default(),
        };
        set(&mut config.endpoint, self.endpoint);
        set(&mut config.daemon_socket, self.daemon_socket);
        set(&mut config.node_id, self.node_id);
        set(&mut config.driver_name, self.driver_name);
        set(&mut config.registration_dir, self.registration_dir.map(Some));
        set(&mut config.kubelet_endpoint, self.kubelet_endpoint.map(Some));
        set(&mut config.health_address, self.health_address.map(Some));
        config.validate()?;
        Ok(config)
    }
}

/// The path of a socket, also in the URI form that the CSI specification uses.
fn endpoint(text: &str) -> Result<PathBuf, std::convert::Infallible> {
    Ok(PathBuf::from(text.strip_prefix("unix://").unwrap_or(text)))
}

fn set<T>(key: &mut T, given: Option<T>) {
    if let Some(given) = given {
        *key = given;
    }
}

fn run(args: Args) -> Result<()> {
    let check_only = args.check_config;
    let config = args.configuration()?;
    if check_only {
        let (endpoint, node) = (config.endpoint.display(), &config.node_id);
        let answer = format!("the configuration is valid: node {node}, socket {endpoint}");
        return Ok(writeln!(std::io::stdout().lock(), "{answer}")?);
    }
    pando_csi::init_log(&config.log)?;
    pando_csi::run(config)
}

fn main() -> ExitCode {
    // Not an option for people: the adapter starts itself with this argument.
    if pando_csi::is_freeze_guard() {
        return pando_csi::freeze_guard();
    }
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // If stderr is closed the error cannot be reported.
            writeln!(std::io::stderr().lock(), "error: {error:#}").unwrap_or_default();
            ExitCode::FAILURE
        }
    }
}
