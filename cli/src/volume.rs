//! The commands on volumes, except the copying ones.

use std::collections::BTreeMap;
use std::io::Write;

use pando_proto::v1::{
    self, AttachVolumeRequest, CreateVolumeRequest, CreateVolumesRequest, DeleteVolumeRequest,
    DetachVolumeRequest, DiffVolumesRequest, GetVolumeRequest, ListAttachmentsRequest,
    ListExportsRequest, ListExtentsRequest, ListVolumesRequest, ModifyVolumeRequest,
    StartExportRequest, StopExportRequest, Volume, VolumeKind,
};

use crate::args::{
    AttachArgs, CloneArgs, DeviceKind, ListArgs, Output, Properties, SetArgs, SnapshotArgs,
    VolumeCommand, VolumeCreateArgs,
};
use crate::client::{Client, by_name};
use crate::error::{Error, Result};
use crate::{export, import, order, table, view};

/// Runs one command.
pub(crate) async fn run(client: Client, output: Output, command: VolumeCommand) -> Result<()> {
    match command {
        VolumeCommand::Create(args) => create(client, output, args).await,
        VolumeCommand::Clone(args) => clone(client, output, args).await,
        VolumeCommand::Snapshot(args) => snapshot(client, output, args).await,
        VolumeCommand::List(args) => list(client, output, args).await,
        VolumeCommand::Show { name, space } => show(client, output, &name, space).await,
        VolumeCommand::Grow { name, size } => {
            let request =
                ModifyVolumeRequest { size_bytes: Some(size), ..ModifyVolumeRequest::default() };
            modify(client, output, &name, request).await
        }
        VolumeCommand::Set(args) => set(client, output, args).await,
        VolumeCommand::Delete { names } => delete(client, output, names).await,
        VolumeCommand::Diff { base, name } => diff(client, output, &base, &name).await,
        VolumeCommand::Extents { name } => extents(client, output, &name).await,
        VolumeCommand::Export(args) => export::run(client, output, args).await,
        VolumeCommand::Import(args) => {
            let volume = import::run(client, args).await?;
            print_volumes(output, vec![volume])
        }
        VolumeCommand::Serve { name: None, .. } => list_exports(client, output).await,
        VolumeCommand::Serve { name: Some(name), stop: true, .. } => {
            stop_export(client, output, &name).await
        }
        VolumeCommand::Serve { name: Some(name), read_only, .. } => {
            serve(client, output, &name, read_only).await
        }
        VolumeCommand::Attach(args) => attach(client, output, args).await,
        VolumeCommand::Detach { names } => detach(client, output, names).await,
        VolumeCommand::Attachments => list_attachments(client, output).await,
    }
}

/// A request with what every new volume can be given.
pub(crate) fn request(name: &str, properties: &Properties) -> CreateVolumeRequest {
    CreateVolumeRequest {
        name: name.to_owned(),
        reservation_bytes: properties.reservation,
        growth_limit_bytes: properties.growth_limit,
        iops_limit: properties.iops_limit,
        bandwidth_limit_bytes: properties.bandwidth_limit,
        labels: properties.labels.iter().cloned().collect(),
        must_be_new: true,
        ..CreateVolumeRequest::default()
    }
}

async fn create(client: Client, output: Output, args: VolumeCreateArgs) -> Result<()> {
    let one = CreateVolumeRequest {
        size_bytes: Some(args.size),
        ..request(&args.name, &args.properties)
    };
    create_all(client, output, vec![one]).await
}

/// Clones volumes, all at one instant.
pub(crate) async fn clone(client: Client, output: Output, args: CloneArgs) -> Result<()> {
    let one = |source: &str, name: &str| CreateVolumeRequest {
        source: by_name(source),
        read_only: args.read_only,
        ..request(name, &args.properties)
    };
    let mut all =
        vec![CreateVolumeRequest { size_bytes: args.size, ..one(&args.source, &args.name) }];
    all.extend(args.with.iter().map(|(source, name)| one(source, name)));
    create_all(client, output, all).await
}

/// Takes snapshots, all at one instant.
pub(crate) async fn snapshot(client: Client, output: Output, args: SnapshotArgs) -> Result<()> {
    let properties = Properties { labels: args.labels, ..Properties::default() };
    let pairs = std::iter::once((args.source, args.name)).chain(args.with);
    let all = pairs
        .map(|(source, name)| CreateVolumeRequest {
            source: by_name(source),
            snapshot: true,
            ..request(&name, &properties)
        })
        .collect();
    create_all(client, output, all).await
}

async fn create_all(
    mut client: Client,
    output: Output,
    volumes: Vec<CreateVolumeRequest>,
) -> Result<()> {
    let made = client.create_volumes(CreateVolumesRequest { volumes }).await?.into_inner();
    print_volumes(output, made.volumes)
}

fn print_volumes(output: Output, volumes: Vec<Volume>) -> Result<()> {
    let volumes: Vec<view::Volume> = volumes.into_iter().map(view::Volume::from).collect();
    table::print(output, &volumes, |volumes| table::volumes(volumes))
}

async fn list(mut client: Client, output: Output, args: ListArgs) -> Result<()> {
    let kind = match (args.volumes, args.snapshots) {
        (true, _) => VolumeKind::Volume,
        (_, true) => VolumeKind::Snapshot,
        _ => VolumeKind::Unspecified,
    };
    let mut request = ListVolumesRequest {
        name_prefix: args.prefix.unwrap_or_default(),
        labels: args.labels.into_iter().collect(),
        source: args.source.and_then(by_name),
        kind: kind.into(),
        ..ListVolumesRequest::default()
    };
    let mut volumes = Vec::new();
    loop {
        let page = client.list_volumes(request.clone()).await?.into_inner();
        volumes.extend(page.volumes);
        if page.next_page_token.is_empty() {
            volumes.sort_by(|a, b| order::natural(&a.name, &b.name));
            return print_volumes(output, volumes);
        }
        request.page_token = page.next_page_token;
    }
}

async fn show(mut client: Client, output: Output, name: &str, with_space: bool) -> Result<()> {
    let request = GetVolumeRequest { volume: by_name(name), with_space };
    let answer = client.get_volume(request).await?.into_inner();
    table::print(output, &view::Volume::from(answer), table::volume)
}

async fn modify(
    mut client: Client,
    output: Output,
    name: &str,
    request: ModifyVolumeRequest,
) -> Result<()> {
    let request = ModifyVolumeRequest { volume: by_name(name), ..request };
    let answer = client.modify_volume(request).await?.into_inner();
    print_volumes(output, answer.volume.into_iter().collect())
}

async fn set(client: Client, output: Output, args: SetArgs) -> Result<()> {
    let labels: BTreeMap<String, String> = args.changes.labels.into_iter().collect();
    let request = ModifyVolumeRequest {
        read_only: args.changes.read_only,
        reservation_bytes: args.changes.reservation,
        growth_limit_bytes: args.changes.growth_limit,
        iops_limit: args.changes.iops_limit,
        bandwidth_limit_bytes: args.changes.bandwidth_limit,
        labels,
        ..ModifyVolumeRequest::default()
    };
    modify(client, output, &args.name, request).await
}

async fn delete(client: Client, output: Output, names: Vec<String>) -> Result<()> {
    let (deleted, failures) = each(&names, async |name| {
        let request = DeleteVolumeRequest { volume: by_name(name) };
        let answer = client.clone().delete_volume(request).await?.into_inner();
        Ok(view::Volume::from(answer.volume.unwrap_or_default()))
    })
    .await;
    table::print_json(output, &deleted)?;
    Error::all(failures)
}

/// Does `work` with each name, whatever becomes of the others.
async fn each<T>(names: &[String], work: impl AsyncFn(&str) -> Result<T>) -> (Vec<T>, Vec<Error>) {
    let (mut done, mut failures) = (Vec::new(), Vec::new());
    for name in names {
        match work(name).await {
            Ok(one) => done.push(one),
            Err(error) => {
                let last = error.is_lost_connection();
                failures.push(error);
                if last {
                    break;
                }
            }
        }
    }
    (done, failures)
}

async fn diff(mut client: Client, output: Output, base: &str, name: &str) -> Result<()> {
    let request = DiffVolumesRequest { base: by_name(base), volume: by_name(name) };
    let mut answers = client.diff_volumes(request).await?.into_inner();
    let mut extents = Vec::new();
    while let Some(answer) = answers.message().await? {
        extents.extend(answer.extents.into_iter().map(view::Extent::from));
    }
    table::print(output, &extents, |extents| table::extents(extents))
}

async fn extents(mut client: Client, output: Output, name: &str) -> Result<()> {
    let request = ListExtentsRequest { volume: by_name(name) };
    let mut answers = client.list_extents(request).await?.into_inner();
    let mut extents = Vec::new();
    while let Some(answer) = answers.message().await? {
        extents.extend(answer.extents.into_iter().map(view::Extent::from));
    }
    table::print(output, &extents, |extents| table::extents(extents))
}

async fn serve(mut client: Client, output: Output, name: &str, read_only: bool) -> Result<()> {
    let request =
        StartExportRequest { volume: by_name(name), read_only, ..StartExportRequest::default() };
    let answer = client.start_export(request).await?.into_inner();
    let export = view::Export::from(answer.export.unwrap_or_default());
    table::print(output, &export, |export| export.uri.clone())
}

async fn stop_export(mut client: Client, output: Output, name: &str) -> Result<()> {
    let request = StopExportRequest { volume: by_name(name), ..StopExportRequest::default() };
    let answer = client.stop_export(request).await?.into_inner();
    table::print_json(output, &view::Export::from(answer.export.unwrap_or_default()))
}

async fn list_exports(mut client: Client, output: Output) -> Result<()> {
    let answer = client.list_exports(ListExportsRequest {}).await?.into_inner();
    let mut exports: Vec<view::Export> =
        answer.exports.into_iter().map(view::Export::from).collect();
    exports.sort_by(|a, b| order::natural(&a.volume_name, &b.volume_name));
    table::print(output, &exports, |exports| table::exports(exports))
}

async fn attach(mut client: Client, output: Output, args: AttachArgs) -> Result<()> {
    let kind = match args.kind {
        DeviceKind::Auto => v1::DeviceKind::Unspecified,
        DeviceKind::Ublk => v1::DeviceKind::Ublk,
        DeviceKind::Nbd => v1::DeviceKind::Nbd,
        DeviceKind::Loop => v1::DeviceKind::Loop,
    };
    let request = AttachVolumeRequest {
        volume: by_name(&args.name),
        kind: kind.into(),
        read_only: args.read_only,
        sector_bytes: args.sector_bytes,
    };
    let answer = client.attach_volume(request).await?.into_inner();
    let attachment = view::Attachment::from(answer.attachment.unwrap_or_default());
    table::print(output, &attachment, |attachment| attachment.device.clone())?;
    if output == Output::Table {
        for why in &attachment.passed_over {
            // A remark; if stderr is closed nobody wants it.
            writeln!(std::io::stderr().lock(), "passed over: {why}").unwrap_or_default();
        }
    }
    Ok(())
}

async fn detach(client: Client, output: Output, names: Vec<String>) -> Result<()> {
    let (detached, failures) = each(&names, async |name| {
        let request = DetachVolumeRequest { volume: by_name(name) };
        let answer = client.clone().detach_volume(request).await?.into_inner();
        answer.attachment.map(view::Attachment::from).ok_or_else(|| {
            Error::not_found(format!("volume {name} is not attached"))
                .hint("`pando volume attachments` lists what is attached")
        })
    })
    .await;
    table::print_json(output, &detached)?;
    Error::all(failures)
}

async fn list_attachments(mut client: Client, output: Output) -> Result<()> {
    let answer = client.list_attachments(ListAttachmentsRequest {}).await?.into_inner();
    let mut attachments: Vec<view::Attachment> =
        answer.attachments.into_iter().map(view::Attachment::from).collect();
    attachments.sort_by(|a, b| order::natural(&a.volume_name, &b.volume_name));
    table::print(output, &attachments, |attachments| table::attachments(attachments))
}
