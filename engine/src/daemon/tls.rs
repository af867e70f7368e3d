//! NBD over TCP: only with TLS, only for clients with a certificate.
//!
//! ```text
//! client --TCP--> greeting: STARTTLS or nothing --> TLS session --relay--> socket pair --> shard
//!                 (nbd::handshake, Tls::Required)   (here)                 (nbd::connection)
//! ```
//!
//! What a client sends behind STARTTLS before the session stands could have been put there by
//! anybody on the way (CVE-2021-3716): the handshake lets go of a client that does so.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};
use tracing::{debug, info, warn};

use crate::daemon::config::NbdTls;
use crate::daemon::engine::Engine;
use crate::error::{Error, Result};
use crate::export::ExportSource;
use crate::export::nbd::Limits;
use crate::export::nbd::connection::{Entry, serve};
use crate::export::nbd::handshake::{Action, Handshake, Tls};
use crate::units::to_u64;

/// Connections at a time.
const CONNECTIONS_MAX: usize = 64;
/// Time for the greeting and the TLS handshake.
const GREETING_TIME_MAX: Duration = Duration::from_secs(20);
/// Bytes of a greeting that are looked at: flags, and options that are refused but STARTTLS.
const GREETING_BYTES_MAX: usize = 4096;
/// Pause after a failed accept: the usual cause is a lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The TLS side of the listener.
pub(super) struct Server {
    listen: std::net::SocketAddr,
    acceptor: TlsAcceptor,
}

impl Server {
    /// Reads the certificates.
    ///
    /// # Errors
    /// A file that cannot be read or does not hold what it should.
    pub(super) fn new(config: &NbdTls) -> Result<Self> {
        let bad = |file: &std::path::Path, why: &dyn std::fmt::Display| {
            Error::invalid(format!("nbd_tls: {}: {why}", file.display()))
        };
        let read = |file: &std::path::Path| -> Result<Vec<CertificateDer<'static>>> {
            let found: std::result::Result<Vec<_>, _> =
                CertificateDer::pem_file_iter(file).and_then(Iterator::collect);
            match found {
                Ok(found) if found.is_empty() => Err(bad(file, &"holds no certificate")),
                Ok(found) => Ok(found),
                Err(error) => Err(bad(file, &error)),
            }
        };
        let mut authorities = RootCertStore::empty();
        for certificate in read(&config.client_ca)? {
            authorities.add(certificate).map_err(|error| bad(&config.client_ca, &error))?;
        }
        let provider = Arc::new(default_provider());
        let clients = WebPkiClientVerifier::builder_with_provider(
            Arc::new(authorities),
            Arc::clone(&provider),
        );
        let clients = clients.build().map_err(|error| bad(&config.client_ca, &error))?;
        let key =
            PrivateKeyDer::from_pem_file(&config.key).map_err(|error| bad(&config.key, &error))?;
        let tls = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| bad(&config.certificate, &error))?
            .with_client_cert_verifier(clients)
            .with_single_cert(read(&config.certificate)?, key)
            .map_err(|error| bad(&config.certificate, &error))?;
        Ok(Self { listen: config.listen, acceptor: TlsAcceptor::from(Arc::new(tls)) })
    }

    /// Listens.
    ///
    /// # Errors
    /// The address cannot be had.
    pub(super) async fn bind(&self) -> Result<TcpListener> {
        TcpListener::bind(self.listen)
            .await
            .map_err(|error| Error::io(format!("nbd_tls on {}", self.listen), error))
    }

    /// Serves `source` until `stopped`, and ends the connections in good order then.
    pub(super) async fn serve(
        self,
        listener: TcpListener,
        engine: Arc<Engine>,
        source: Arc<dyn ExportSource>,
        mut stopped: watch::Receiver<bool>,
    ) {
        info!(address = %self.listen, "nbd over tls is served");
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let mut turn = 0;
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = stopped.wait_for(|stopped| *stopped) => break,
            };
            let (client, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    warn!(%error, "nbd connection is not accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
                warn!(%peer, max = CONNECTIONS_MAX, "nbd connection is refused");
                continue;
            };
            turn = (turn + 1) % engine.shards().len();
            let connection = Connection {
                acceptor: self.acceptor.clone(),
                shard: engine.shards()[turn].clone(),
                source: Arc::clone(&source),
                stopped: stopped.clone(),
            };
            tokio::spawn(async move {
                if let Err(error) = connection.run(client).await {
                    debug!(%peer, %error, "nbd connection ended");
                }
                drop(place);
            });
        }
        // All places free again: all connections have ended.
        let all = u32::try_from(CONNECTIONS_MAX).unwrap_or(u32::MAX);
        places.acquire_many(all).await.map(|_| ()).unwrap_or_default();
    }
}

/// What one connection needs.
struct Connection {
    acceptor: TlsAcceptor,
    shard: crate::runtime::shard::ShardHandle,
    source: Arc<dyn ExportSource>,
    stopped: watch::Receiver<bool>,
}

impl Connection {
    async fn run(self, mut client: TcpStream) -> io::Result<()> {
        client.set_nodelay(true)?;
        let secured = tokio::time::timeout(GREETING_TIME_MAX, async {
            match greet(&mut client).await? {
                None => Ok(None),
                Some(handshake) => {
                    self.acceptor.accept(client).await.map(|tls| Some((tls, handshake)))
                }
            }
        });
        let Some((tls, handshake)) = secured.await.map_err(io::Error::from)?? else {
            return Ok(());
        };
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let source = self.source;
        let serving = move || async move {
            let socket = Arc::new(OwnedFd::from(theirs));
            let entry = Entry::InsideTls(handshake);
            if let Err(error) = serve(socket, &*source, entry, Limits::default()).await {
                debug!(%error, "nbd connection ended");
            }
        };
        self.shard.spawn(serving).map_err(io::Error::other)?;
        relay(tls, UnixStream::from_std(ours)?, self.stopped).await;
        Ok(())
    }
}

/// Brings a connection up to STARTTLS; `None` when the client leaves before that.
async fn greet(
    client: &mut (impl AsyncRead + AsyncWrite + Unpin),
) -> io::Result<Option<Handshake>> {
    let mut out = Vec::new();
    let mut input = Vec::new();
    let mut handshake = Handshake::start(Tls::Required, &mut out);
    loop {
        let (taken, action) = handshake.step(&input, &mut out);
        input.drain(..taken);
        match action {
            Action::StartTls => {
                debug_assert!(input.is_empty(), "nothing in clear comes behind STARTTLS");
                client.write_all(&out).await?;
                return Ok(Some(handshake));
            }
            Action::Read if input.len() < GREETING_BYTES_MAX => {
                client.write_all(&out).await?;
                out.clear();
                let room = to_u64(GREETING_BYTES_MAX - input.len());
                if (&mut *client).take(room).read_buf(&mut input).await? == 0 {
                    return Ok(None);
                }
            }
            // Before TLS nothing is listed and nothing opened, and no greeting is this long.
            Action::Read | Action::List | Action::Open(_) | Action::Close => {
                client.write_all(&out).await?;
                return Ok(None);
            }
        }
    }
}

/// Moves bytes both ways until the server has closed its end. When the client leaves, or the
/// daemon stops, the server is told that nothing more comes, and finishes what is in flight.
async fn relay(
    tls: impl AsyncRead + AsyncWrite,
    ours: UnixStream,
    mut stopped: watch::Receiver<bool>,
) {
    let (mut from_client, mut to_client) = tokio::io::split(tls);
    let (mut from_server, mut to_server) = ours.into_split();
    let up = async {
        tokio::select! {
            _ = copy(&mut from_client, &mut to_server) => {}
            _ = stopped.wait_for(|stopped| *stopped) => {}
        }
        // The other side may be gone already.
        to_server.shutdown().await.unwrap_or_default();
        std::future::pending::<()>().await;
    };
    let down = async {
        copy(&mut from_server, &mut to_client).await.map(|_| ()).unwrap_or_default();
        to_client.shutdown().await.unwrap_or_default();
    };
    tokio::select! {
        () = up => {}
        () = down => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::config::NbdTls;
    use crate::export::nbd::proto::{option, reply};

    /// What a client says: flags, then options without data.
    fn said(options: &[u32]) -> Vec<u8> {
        let mut bytes = 1_u32.to_be_bytes().to_vec();
        for option in options {
            bytes.extend(b"IHAVEOPT");
            bytes.extend(option.to_be_bytes());
            bytes.extend(0_u32.to_be_bytes());
        }
        bytes
    }

    /// What comes of a client that says `bytes` and no more, and what it is answered.
    async fn greeted(bytes: &[u8]) -> (io::Result<Option<Handshake>>, Vec<u8>) {
        let (mut client, mut server) = tokio::io::duplex(1 << 20);
        client.write_all(bytes).await.unwrap();
        client.shutdown().await.unwrap();
        let outcome = greet(&mut server).await;
        drop(server);
        let mut answers = Vec::new();
        client.read_to_end(&mut answers).await.unwrap();
        (outcome, answers)
    }

    #[tokio::test]
    async fn nothing_is_served_before_tls() {
        let (outcome, answers) = greeted(&said(&[option::LIST, option::STARTTLS])).await;
        assert!(outcome.unwrap().is_some());
        let refusal = reply::ERR_TLS_REQD.to_be_bytes();
        assert!(answers.windows(4).any(|word| word == refusal), "{answers:?}");
        let (outcome, _) = greeted(&said(&[option::LIST, option::ABORT])).await;
        assert!(outcome.unwrap().is_none());
        let (outcome, _) = greeted(&said(&[])).await;
        assert!(outcome.unwrap().is_none());
    }

    #[tokio::test]
    async fn plain_text_behind_starttls_ends_the_connection() {
        let mut bytes = said(&[option::STARTTLS]);
        bytes.extend(&said(&[option::LIST])[4..]);
        assert!(greeted(&bytes).await.0.unwrap().is_none());
    }

    #[test]
    fn missing_certificates_are_named() {
        let config = NbdTls {
            listen: "127.0.0.1:0".parse().unwrap(),
            certificate: "/nonexistent/server.pem".into(),
            key: "/nonexistent/server.key".into(),
            client_ca: "/nonexistent/clients.pem".into(),
        };
        let error = Server::new(&config).err().unwrap();
        assert!(error.to_string().contains("/nonexistent/clients.pem"), "{error}");
    }
}
