//! The adapter beside its calls about volumes: who it is, whether it is ready, how kubelet gets to
//! know it, how it starts and ends.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

use pando_csi::proto::csi;
use pando_csi::proto::csi::identity_client::IdentityClient;
use pando_csi::proto::csi::plugin_capability::Type as Plugin;
use pando_csi::proto::registration as reg;
use pando_csi::proto::registration::registration_client::RegistrationClient;
use pando_tests::system::programs;
use pando_tests::{Csi, System, tools};
use tonic::transport::Endpoint;

/// An address on which nobody listens.
fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address").to_string()
}

/// Status line of the answer to a request for `path`.
fn http(address: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(address).expect("a listener");
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").expect("sent");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("an answer");
    text.lines().next().expect("a status line").to_owned()
}

#[test]
fn it_says_who_it_is_and_what_it_can() {
    let system = System::start("256MiB");
    let csi = Csi::start(&system);
    let mut client = IdentityClient::new(csi.channel());
    let info = csi.answer(client.get_plugin_info(csi::GetPluginInfoRequest {})).expect("info");
    assert_eq!(info.name, "csi.pando.dev");
    let request = csi::GetPluginCapabilitiesRequest {};
    let can = csi.answer(client.get_plugin_capabilities(request)).expect("capabilities");
    let can = can.capabilities.into_iter().filter_map(|capability| capability.r#type);
    let (services, expansions): (Vec<_>, Vec<_>) =
        can.partition(|capability| matches!(capability, Plugin::Service(_)));
    assert_eq!((services.len(), expansions.len()), (4, 1));

    let capabilities = |csi: &Csi| {
        let request = csi::ControllerGetCapabilitiesRequest {};
        let can = csi.answer(csi.controller().controller_get_capabilities(request));
        can.expect("capabilities").capabilities.len()
    };
    assert_eq!(capabilities(&csi), 11);
    drop(csi);
    let config = system.path().join("csi.toml");
    std::fs::write(&config, "controller_expand = false\n").expect("a file");
    let csi = Csi::with(&system, &["--config", tools::text(&config)]);
    assert_eq!(capabilities(&csi), 10, "the nodes grow volumes by themselves");
    let mode = std::fs::metadata(system.path().join("csi.sock")).expect("a socket").permissions();
    assert_eq!(mode.mode() & 0o777, 0o600);
}

/// A restart mends neither the daemon nor its pool: what leads to one must not ask about them.
#[test]
fn it_is_alive_without_the_daemon_and_ready_with_it() {
    let mut system = System::start("256MiB");
    let address = free_address();
    let csi = Csi::with(&system, &["--health-address", &address]);
    let probe = || {
        let mut client = IdentityClient::new(csi.channel());
        csi.answer(client.probe(csi::ProbeRequest {})).expect("an answer").ready
    };
    let paths = || ["/healthz", "/readyz"].map(|path| http(&address, path));
    let (good, bad) = ("HTTP/1.1 200 OK", "HTTP/1.1 503 Service Unavailable");
    assert_eq!((probe(), paths()), (Some(true), [good, good].map(str::to_owned)));
    assert_eq!(http(&address, "/"), "HTTP/1.1 404 Not Found");
    system.kill();
    assert_eq!((probe(), paths()), (Some(true), [good, bad].map(str::to_owned)));
    system.spawn();
    assert_eq!((probe(), paths()), (Some(true), [good, good].map(str::to_owned)));
}

#[test]
fn it_makes_itself_known_to_kubelet() {
    let system = System::start("256MiB");
    let directory = system.path().join("plugins_registry");
    let csi = Csi::with(&system, &["--registration-dir", tools::text(&directory)]);
    let socket = directory.join("csi.pando.dev-reg.sock");
    let address = Endpoint::from_shared(format!("unix:{}", socket.display())).expect("an address");
    let mut client =
        csi.wait(async { RegistrationClient::new(address.connect().await.expect("a socket")) });
    let info = csi.answer(client.get_info(reg::InfoRequest {})).expect("info");
    let expected = reg::PluginInfo {
        r#type: "CSIPlugin".to_owned(),
        name: "csi.pando.dev".to_owned(),
        endpoint: system.path().join("csi.sock").display().to_string(),
        supported_versions: vec!["1.0.0".to_owned()],
    };
    assert_eq!(info, expected);
    let refusal = reg::RegistrationStatus { plugin_registered: false, error: "why".to_owned() };
    csi.answer(client.notify_registration_status(refusal)).expect("an answer");
    assert!(csi.log().contains("kubelet refuses the driver"));
}

/// A frame of HTTP/2.
fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    let length = u8::try_from(payload.len()).expect("a short frame");
    [&[0, 0, length, kind, flags, 0, 0, 0, stream][..], payload].concat()
}

/// A field of a call, whose name is in the table of HTTP/2 at `index`.
fn field(index: u8, value: &str) -> Vec<u8> {
    let length = u8::try_from(value.len()).expect("a short text");
    [&[0x40 | index, length][..], value.as_bytes()].concat()
}

/// kubelet looks for plugins with a client in Go that says the path of the socket for `:authority`,
/// which is none: HTTP/2 as tonic knows it ends such a call with a reset.
#[test]
fn the_path_of_the_socket_is_taken_for_an_authority() {
    const HEADERS: u8 = 1;
    let system = System::start("256MiB");
    let directory = system.path().join("plugins_registry");
    let _csi = Csi::with(&system, &["--registration-dir", tools::text(&directory)]);
    let socket = directory.join("csi.pando.dev-reg.sock");
    // The socket for kubelet comes after the one that the start waits for.
    let since = Instant::now();
    while !socket.exists() && since.elapsed() < Duration::from_secs(30) {
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut stream = UnixStream::connect(&socket).expect("a socket");
    stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a limit");
    let path = "/pluginregistration.Registration/GetInfo";
    let authority = tools::text(&socket).replace('/', "%2F");
    let method_and_scheme = [0x83, 0x86];
    let fields = [field(4, path), field(1, &authority), field(31, "application/grpc")].concat();
    let call = [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        frame(4, 0, 0, &[]),
        frame(HEADERS, 4, 1, &[&method_and_scheme[..], &fields].concat()),
        frame(0, 1, 1, &[0; 5]),
    ];
    stream.write_all(&call.concat()).expect("sent");
    let answer = loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).expect("a frame");
        let length = usize::from(head[1]) << 8 | usize::from(head[2]);
        stream.read_exact(&mut vec![0; length]).expect("a payload");
        if head[8] == 1 {
            break head[3];
        }
    };
    assert_eq!(answer, HEADERS, "the kind of the first frame of the call");
}

#[test]
fn mistakes_end_it_at_once() {
    let refusal = |arguments: &[&str]| {
        let output = Command::new(programs().join("pando-csi"))
            .args(arguments)
            .env_remove("CSI_ENDPOINT")
            .output()
            .expect("pando-csi starts; `make test` builds it");
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).expect("text")
    };
    assert!(refusal(&[]).starts_with("error: node_id = \"\""));
    assert!(refusal(&["--node-id=n", "--endpoint=unix:///x/csi"]).contains("ends in .sock"));
    let missing = refusal(&["--node-id=n", "--config=/nonexistent"]);
    assert!(missing.starts_with("error: configuration /nonexistent: "), "{missing}");
}
