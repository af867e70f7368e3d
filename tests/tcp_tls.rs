//! NBD over TCP: only with TLS, and only for clients with a certificate of the right authority.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};

use pando_tests::System;
use pando_tests::noise::Noise;
use pando_tests::tools::{output, present, run, text};

/// An authority and what it has signed, as openssl makes them and libnbd wants to find them.
struct Authority(PathBuf);

impl Authority {
    fn new(directory: PathBuf) -> Self {
        std::fs::create_dir(&directory).expect("a directory");
        let authority = Self(directory);
        let (key, cert) = (authority.path("ca-key.pem"), authority.path("ca-cert.pem"));
        let new = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"];
        let rest = ["-nodes", "-days", "2", "-subj", "/CN=Pando test", "-keyout", &key];
        run("openssl", &[&new[..], &rest, &["-out", &cert]].concat());
        authority
    }

    fn path(&self, name: &str) -> String {
        text(&self.0.join(name)).to_owned()
    }

    /// Signs a certificate for `name`; `NAME-cert.pem` and `NAME-key.pem`.
    fn sign(&self, name: &str) {
        let (key, request) = (self.path(&format!("{name}-key.pem")), self.path("request.pem"));
        let new = ["req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"];
        let rest = ["-nodes", "-subj", "/CN=localhost", "-keyout", &key, "-out", &request];
        run("openssl", &[&new[..], &rest].concat());
        let extensions = self.path("extensions");
        let lines = "subjectAltName=DNS:localhost,IP:127.0.0.1\nbasicConstraints=CA:FALSE\n";
        std::fs::write(&extensions, lines).expect("a file");
        let (ca, ca_key) = (self.path("ca-cert.pem"), self.path("ca-key.pem"));
        let cert = self.path(&format!("{name}-cert.pem"));
        let sign = ["x509", "-req", "-in", &request, "-CA", &ca, "-CAkey", &ca_key, "-days", "2"];
        let rest = ["-CAcreateserial", "-extfile", &extensions, "-out", &cert];
        run("openssl", &[&sign[..], &rest].concat());
    }
}

/// A port that nobody has at the moment.
fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address").port()
}

fn uri(port: u16, certificates: &Path) -> String {
    format!("nbds://localhost:{port}/db?tls-certificates={}", certificates.display())
}

#[test]
fn only_known_clients_get_through() {
    if !present(&["openssl", "nbdcopy", "nbdinfo"]) {
        return;
    }
    let certificates = tempfile::tempdir().expect("a directory");
    let ours = Authority::new(certificates.path().join("ours"));
    let strangers = Authority::new(certificates.path().join("strangers"));
    ours.sign("server");
    ours.sign("client");
    strangers.sign("client");
    // A stranger who knows our authority, so that it is the server that refuses.
    std::fs::copy(ours.path("ca-cert.pem"), strangers.path("ca-cert.pem")).expect("a file");
    let port = free_port();
    let config = format!(
        "[nbd_tls]\nlisten = \"127.0.0.1:{port}\"\ncertificate = {:?}\nkey = {:?}\n\
         client_ca = {:?}\n",
        ours.path("server-cert.pem"),
        ours.path("server-key.pem"),
        ours.path("ca-cert.pem"),
    );
    let system = System::with("128MiB", &config);
    let file = system.path().join("file");
    std::fs::write(&file, Noise::new(1).bytes(8 << 20)).expect("a file");
    let cli = system.cli();
    cli.run(&["volume", "create", "db", "--size", "8MiB"]);

    let known = uri(port, &ours.0);
    run("nbdcopy", &["--flush", text(&file), &known]);
    let back = system.path().join("back");
    run("nbdcopy", &["--connections=4", &known, text(&back)]);
    assert!(std::fs::read(&back).expect("a file") == std::fs::read(&file).expect("a file"));

    let refused = output("nbdinfo", &[uri(port, &strangers.0)]);
    assert!(!refused.status.success(), "a stranger is not served");
    let plain = output("nbdinfo", &[format!("nbd://localhost:{port}/db")]);
    assert!(!plain.status.success(), "nothing is served in the clear");
    let mut scanner = TcpStream::connect(("127.0.0.1", port)).expect("a connection");
    scanner.write_all(&Noise::new(9).bytes(4000)).expect("a connection");
    // Whatever it is answered, it is hung up on.
    scanner.read_to_end(&mut Vec::new()).map(|_| ()).unwrap_or_default();
    run("nbdinfo", &[&known]);
}
